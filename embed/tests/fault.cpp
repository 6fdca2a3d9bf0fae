// Servers that fail in every way, and callers that do: what comes is an error of the right kind, in time, with nothing
// left behind.
#include <sys/mman.h>
#include <sys/stat.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <sys/time.h>

#include <chrono>
#include <csignal>
#include <future>
#include <random>

#include "check.hpp"
#include "fake_server.hpp"
#include "sdrt.hpp"

namespace {

using Clock = std::chrono::steady_clock;

std::string little(std::uint64_t number, int bytes) {
  std::string text;
  for (int i = 0; i < bytes; ++i) {
    text.push_back(static_cast<char>(number >> (8 * i) & 0xFF));
  }
  return text;
}

std::string frame(unsigned kind, unsigned image, const std::string &payload) {
  return little(payload.size(), 4) + little(kind, 2) + little(image, 2) + payload;
}

// A picture of 8x8 pixels.
constexpr std::size_t kPixels = 8 * 8 * 3;
const std::string kPixelBytes = [] {
  std::string pixels;
  for (std::size_t i = 0; i < kPixels; ++i) {
    pixels.push_back(static_cast<char>(i * 5));
  }
  return pixels;
}();

std::string accepted(unsigned images = 1, unsigned width = 8, unsigned height = 8) {
  return frame(1, 0, little(images, 4) + little(2, 4) + little(width, 4) + little(height, 4) + little(0, 4));
}
std::string step(unsigned number, unsigned image = 0) {
  return frame(2, image, little(number, 4) + little(2, 4) + little(0, 8) + little(0, 8));
}
std::string preview() {
  return frame(3, 0, little(1, 4) + little(2, 4) + little(8, 4) + little(8, 4) + kPixelBytes);
}
std::string image(unsigned number = 0, unsigned flags = 0, const std::string &pixels = kPixelBytes) {
  return frame(4, number, little(42, 8) + little(8, 4) + little(8, 4) + little(flags, 4) + little(5, 4) + "hello" + pixels);
}
std::string done() { return frame(5, 0, "{\"model\": \"fake\"}"); }
std::string refused(unsigned status, const std::string &code) {
  return frame(6, 0, little(status, 4) + "{\"error\": {\"message\": \"it failed\", \"code\": \"" + code + "\"}}");
}

std::string chunked(const std::string &body, std::size_t size = 1000) {
  std::string text = "HTTP/1.1 200 OK\r\nContent-Type: application/vnd.sdrt.frames\r\nTransfer-Encoding: chunked\r\n\r\n";
  for (std::size_t at = 0; at < body.size(); at += size) {
    const std::string part = body.substr(at, size);
    char head[20];
    std::snprintf(head, sizeof head, "%zx\r\n", part.size());
    text += head + part + "\r\n";
  }
  return text + "0\r\n\r\n";
}

std::string answer(int status, const std::string &body, const std::string &more = "") {
  return "HTTP/1.1 " + std::to_string(status) + " X\r\nContent-Length: " + std::to_string(body.size()) + "\r\n" + more +
         "\r\n" + body;
}

std::string error_answer(int status, const std::string &code, const std::string &more = "") {
  return answer(status, "{\"error\": {\"message\": \"it is wrong\", \"code\": \"" + code + "\"}}", more);
}

const std::string kModels =
    answer(200, "{\"models\": [{\"id\": \"fake\", \"created\": 5, \"width\": 8, \"height\": 16}]}");
const std::string kWhole = chunked(accepted() + step(1) + preview() + step(2) + image() + done(), 33);

bool asks_for_models(const std::string &request) { return request.compare(0, 22, "GET /native/v1/models ") == 0; }

// Answers questions for models well, and those for pictures as told.
FakeServer::Handler pictures(const FakeServer::Handler &handler) {
  return [handler](int socket, const std::string &request) {
    if (asks_for_models(request)) {
      FakeServer::send_all(socket, kModels);
    } else {
      handler(socket, request);
    }
  };
}
FakeServer::Handler pictures(const std::string &text) {
  return pictures([text](int socket, const std::string &) { FakeServer::send_all(socket, text); });
}

// Says nothing until the client goes.
void hang(int socket) {
  pollfd watched = {socket, POLLRDHUP, 0};
  poll(&watched, 1, 60000);
}

// Where all is slow, one in so many of what is tried again and again does.
unsigned share() {
  const std::string given = check::setting("SDRT_TEST_SHARE");
  return given.empty() ? 1 : static_cast<unsigned>(std::stoul(given));
}

sdrt::Params star() {
  sdrt::Params params;
  params.prompt = "a star";
  return params;
}

struct Outcome {
  sdrt_status status = SDRT_OK;
  std::string message;
  int http_status = 0;
  long long retry_after = 0;
  double seconds = 0;
};

template <typename Work>
Outcome outcome(Work work) {
  Outcome found;
  const auto began = Clock::now();
  try {
    work();
  } catch (const sdrt::Error &error) {
    found = {error.status(), error.what(), error.http_status(), error.retry_after().count(), 0};
    CHECK(!found.message.empty());
    CHECK(found.message.find('\n') == std::string::npos);
  }
  found.seconds = std::chrono::duration<double>(Clock::now() - began).count();
  return found;
}

// What becomes of one picture that is asked of a server that answers so.
Outcome asked(const std::string &text, const sdrt::Params &params = star()) {
  FakeServer fake(pictures(text));
  const sdrt::Server server = sdrt::Server::connect(fake.path());
  return outcome([&] { server.generate(params); });
}

std::atomic<int> alarms{0};

}  // namespace

TEST(answers_come_in_pieces) {
  for (const std::size_t piece : {1u, 7u, 4096u}) {
    FakeServer fake(pictures([piece](int socket, const std::string &) { FakeServer::send_all(socket, kWhole, piece); }));
    const sdrt::Server server = sdrt::Server::connect(fake.path());
    const std::vector<sdrt::Model> models = server.models();
    CHECK_EQUAL(models.size(), 1u);
    CHECK_EQUAL(models[0].name, "fake");
    CHECK_EQUAL(models[0].created.count(), 5);
    CHECK_EQUAL(models[0].height, 16u);
    sdrt::Params params = star();
    std::string events;
    params.progress = [&](const sdrt_progress &progress) {
      events += std::to_string(progress.event) + std::to_string(progress.step) + " ";
      if (progress.pixels != nullptr) {
        CHECK(std::string(progress.pixels, progress.pixels + progress.pixels_size) == kPixelBytes);
      }
      return true;
    };
    const sdrt::Result result = server.generate(params);
    CHECK_EQUAL(events, "10 21 31 22 40 ");
    CHECK_EQUAL(result.size(), 1u);
    CHECK_EQUAL(result[0].seed, 42u);
    CHECK_EQUAL(std::string(result[0].parameters), "hello");
    CHECK(std::string(result[0].pixels, result[0].pixels + result[0].pixels_size) == kPixelBytes);
    CHECK_EQUAL(std::string(result.settings()), "{\"model\": \"fake\"}");
  }
}

TEST(requests_say_what_was_asked) {
  FakeServer fake(pictures(kWhole));
  sdrt::Options options;
  options.api_key = "open-sesame";
  const sdrt::Server server = sdrt::Server::connect("unix:" + fake.path(), options);
  sdrt::Params params;
  params.prompt = "a \"star\"\n\xC3\xA4";
  params.negative_prompt = "n";
  params.model = "m";
  params.sampler = "ddim";
  params.timestep_spacing = "trailing";
  params.width = 8;
  params.height = 8;
  params.steps = 2;
  params.guidance_scale = 0;
  params.guidance_interval = {0.5, 5};
  params.eta = 0.1;
  params.seed = 18446744073709551615u;
  params.clip_skip = 0;
  params.cache_interval = 3;
  params.encoder_interval = 2;
  params.preview_interval = 4;
  params.progress = [](const sdrt_progress &) { return true; };
  server.generate(params);
  const std::string request = fake.requests().back();
  CHECK(request.find("POST /native/v1/generate HTTP/1.1\r\nHost: sdrt\r\n") == 0);
  CHECK(request.find("\r\nAuthorization: Bearer open-sesame\r\n") != std::string::npos);
  CHECK_EQUAL(request.substr(request.find("\r\n\r\n") + 4),
              "{\"prompt\":\"a \\\"star\\\"\\u000a\xC3\xA4\",\"negative_prompt\":\"n\",\"model\":\"m\",\"sampler\":\"ddim\","
              "\"timestep_spacing\":\"trailing\",\"width\":8,\"height\":8,\"num_inference_steps\":2,\"n\":1,"
              "\"cache_interval\":3,\"encoder_interval\":2,\"preview_interval\":4,\"guidance_scale\":1,\"eta\":0.1,"
              "\"guidance_interval\":[0.5,5],\"seed\":18446744073709551615,\"clip_skip\":0}");
  server.generate(star());
  const std::string plain = fake.requests().back();
  CHECK_EQUAL(plain.substr(plain.find("\r\n\r\n") + 4), "{\"prompt\":\"a star\",\"n\":1}");
}

TEST(the_key_of_the_environment) {
  FakeServer fake(pictures(kWhole));
  setenv("SDRT_API_KEY", "from-outside", 1);
  sdrt::Server::connect(fake.path());
  setenv("SDRT_API_KEY", "with space", 1);
  const Outcome wrong = outcome([&] { sdrt::Server::connect(fake.path()); });
  unsetenv("SDRT_API_KEY");
  CHECK(fake.requests().back().find("\r\nAuthorization: Bearer from-outside\r\n") != std::string::npos);
  CHECK_EQUAL(wrong.status, SDRT_INVALID_ARGUMENT);
  sdrt::Server::connect(fake.path());
  CHECK(fake.requests().back().find("Authorization") == std::string::npos);
}

TEST(refusals_have_codes) {
  const struct {
    int status;
    const char *code;
    sdrt_status expected;
  } cases[] = {
      {400, "", SDRT_INVALID_ARGUMENT},     {401, "invalid_api_key", SDRT_UNAUTHORIZED}, {403, "", SDRT_UNAUTHORIZED},
      {404, "", SDRT_NOT_FOUND},            {408, "", SDRT_TIMEOUT},                     {413, "", SDRT_INVALID_ARGUMENT},
      {415, "", SDRT_INVALID_ARGUMENT},     {429, "queue_full", SDRT_QUEUE_FULL},        {500, "", SDRT_SERVER_ERROR},
      {503, "loading", SDRT_UNAVAILABLE},   {503, "draining", SDRT_UNAVAILABLE},
      {503, "out_of_memory", SDRT_OUT_OF_MEMORY},
  };
  for (const auto &each : cases) {
    const Outcome early = asked(error_answer(each.status, each.code, "Retry-After: 7\r\n"));
    CHECK_EQUAL(early.status, each.expected);
    CHECK_EQUAL(early.message, "it is wrong");
    CHECK_EQUAL(early.http_status, each.status);
    CHECK_EQUAL(early.retry_after, 7);
    const Outcome late = asked(chunked(accepted() + step(1) + refused(static_cast<unsigned>(each.status), each.code)));
    CHECK_EQUAL(late.status, each.expected);
    CHECK_EQUAL(late.message, "it failed");
  }
}

TEST(what_is_no_sdrt_server) {
  for (const std::string &text : {std::string("HTTP/1.1 404 Not Found\r\nContent-Length: 13\r\n\r\n<html></html>"),
                                  answer(200, "<html></html>"), answer(200, "{}"), answer(500, ""),
                                  std::string("220 mail.example ESMTP\r\n"), std::string("\0\0\0\5hello\n", 10)}) {
    FakeServer fake([&](int socket, const std::string &) { FakeServer::send_all(socket, text); });
    const Outcome found = outcome([&] { sdrt::Server::connect(fake.path()).models(); });
    CHECK_EQUAL(found.status, SDRT_PROTOCOL);
  }
  FakeServer old([](int socket, const std::string &) { FakeServer::send_all(socket, error_answer(404, "")); });
  const Outcome found = outcome([&] { sdrt::Server::connect(old.path()); });
  CHECK_EQUAL(found.status, SDRT_NOT_FOUND);
  CHECK(found.message.find("native protocol") != std::string::npos);
  CHECK_EQUAL(asked(answer(200, kPixelBytes)).status, SDRT_PROTOCOL);
}

TEST(nobody_is_there) {
  CHECK_EQUAL(outcome([] { sdrt::Server::connect("/no/such/socket"); }).status, SDRT_CONNECTION);
  CHECK_EQUAL(outcome([] { sdrt::Server::connect("127.0.0.1:1"); }).status, SDRT_CONNECTION);
  CHECK_EQUAL(outcome([] { sdrt::Server::connect("no.such.host.invalid:1"); }).status, SDRT_CONNECTION);
  CHECK_EQUAL(outcome([] { sdrt::Server::connect("https://127.0.0.1"); }).status, SDRT_INVALID_ARGUMENT);
}

TEST(answers_that_are_cut_at_any_place) {
  std::string whole;
  std::atomic<std::size_t> size{0};
  FakeServer fake(pictures([&](int socket, const std::string &) {
    FakeServer::send_all(socket, kWhole.substr(0, size));
  }));
  const sdrt::Server server = sdrt::Server::connect(fake.path());
  for (; size < kWhole.size(); size += share() * (size < 200 ? 1 : 13)) {
    const Outcome found = outcome([&] { server.generate(star()); });
    // Without the last, empty chunk it is whole in all but its form.
    CHECK(found.status == SDRT_CONNECTION || size + 10 > kWhole.size());
  }
}

TEST(answers_with_any_byte_wrong) {
  std::atomic<unsigned> seed{0};
  FakeServer fake(pictures([&](int socket, const std::string &) {
    std::minstd_rand random(seed);
    std::string text = kWhole;
    for (unsigned count = random() % 4 + 1; count > 0; --count) {
      text[random() % text.size()] = static_cast<char>(random() >> 8);
    }
    FakeServer::send_all(socket, text);
  }));
  const sdrt::Server server = sdrt::Server::connect(fake.path());
  const unsigned last = 300 / share();
  int failed = 0;
  for (seed = 1; seed <= last; ++seed) {
    const Outcome found = outcome([&] { server.generate(star()); });
    failed += found.status != SDRT_OK;
    CHECK(found.status != SDRT_TIMEOUT && found.status != SDRT_SYSTEM);
  }
  CHECK(failed > 0);
}

TEST(frames_in_another_order) {
  const std::string orders[] = {
      step(1) + done(),
      accepted() + done(),
      accepted() + accepted() + image() + done(),
      accepted() + image() + image() + done(),
      accepted(2) + image() + image(1) + done(),
      accepted() + step(1, 1) + image() + done(),
      accepted() + image(1) + done(),
      accepted() + image(0, 1, "") + done(),
      accepted() + image(0, 0, kPixelBytes + "x") + done(),
      accepted() + image(0, 0, "short") + done(),
      accepted(1, 16) + image() + done(),
      accepted(1, 0) + done(),
      accepted(1, 65536, 65536) + done(),
      done(),
  };
  for (const std::string &order : orders) {
    CHECK_EQUAL(asked(chunked(order)).status, SDRT_PROTOCOL);
  }
  CHECK_EQUAL(asked(chunked(accepted() + frame(77, 3, "news") + frame(7, 0, "") + image() + done())).status, SDRT_OK);
}

TEST(requests_that_are_not_read) {
  sdrt::Params large = star();
  large.prompt.assign(3000000, 'x');  // more than a socket holds
  for (const bool answers : {true, false}) {
    FakeServer fake([answers](int socket, const std::string &request) {
      if (asks_for_models(request)) {
        FakeServer::send_all(socket, kModels);
      } else if (answers) {
        FakeServer::send_all(socket, error_answer(413, ""));
      }
    });
    const sdrt::Server server = sdrt::Server::connect(fake.path());
    fake.leave_unread();
    // SIGPIPE has its default action here.
    const Outcome found = outcome([&] { server.generate(large); });
    CHECK_EQUAL(found.status, answers ? SDRT_INVALID_ARGUMENT : SDRT_CONNECTION);
  }
}

TEST(servers_that_say_nothing) {
  sdrt::Options options;
  options.silence_timeout = std::chrono::milliseconds(300);
  for (const std::string &beginning : {std::string(), kWhole.substr(0, 40), kWhole.substr(0, 200)}) {
    FakeServer fake(pictures([&](int socket, const std::string &) {
      FakeServer::send_all(socket, beginning);
      hang(socket);
    }));
    const sdrt::Server server = sdrt::Server::connect(fake.path(), options);
    const Outcome silent = outcome([&] { server.generate(star()); });
    CHECK_EQUAL(silent.status, SDRT_TIMEOUT);
    CHECK(silent.message.find("300 ms") != std::string::npos);
    CHECK(silent.seconds >= 0.3 && silent.seconds < 50);
    sdrt::Params params = star();
    params.timeout = std::chrono::milliseconds(30);
    const Outcome late = outcome([&] { server.generate(params); });
    CHECK_EQUAL(late.status, SDRT_TIMEOUT);
    CHECK(late.message.find("30 ms") != std::string::npos);
  }
}

TEST(servers_that_talk_without_end) {
  FakeServer fake(pictures([](int socket, const std::string &) {
    std::string text = chunked(accepted());
    text.resize(text.size() - 5);
    while (FakeServer::send_all(socket, text)) {
      text = "8\r\n" + frame(7, 0, "") + "\r\n";
    }
  }));
  const sdrt::Server server = sdrt::Server::connect(fake.path());
  sdrt::Params params = star();
  params.timeout = std::chrono::milliseconds(60);
  CHECK_EQUAL(outcome([&] { server.generate(params); }).status, SDRT_TIMEOUT);
  sdrt::Cancellation cancellation;
  params.timeout.reset();
  params.cancellation = &cancellation;
  auto running = std::async(std::launch::async, [&] { return outcome([&] { server.generate(params); }); });
  std::this_thread::sleep_for(std::chrono::milliseconds(30));
  cancellation.cancel();
  CHECK_EQUAL(running.get().status, SDRT_CANCELLED);
}

TEST(servers_that_do_not_accept) {
  char folder[] = "/tmp/sdrt-test-XXXXXX";
  const std::string path = std::string(mkdtemp(folder)) + "/s";
  const int listening = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
  sockaddr_un name = {};
  name.sun_family = AF_UNIX;
  std::strcpy(name.sun_path, path.c_str());
  CHECK(bind(listening, reinterpret_cast<sockaddr *>(&name), sizeof name) == 0 && listen(listening, 0) == 0);
  const int first = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
  CHECK(connect(first, reinterpret_cast<sockaddr *>(&name), sizeof name) == 0);
  sdrt::Options options;
  options.connect_timeout = std::chrono::milliseconds(50);
  const Outcome found = outcome([&] { sdrt::Server::connect(path, options); });
  CHECK_EQUAL(found.status, SDRT_TIMEOUT);
  sdrt::Cancellation cancellation;
  cancellation.cancel();
  options.cancellation = &cancellation;
  CHECK_EQUAL(outcome([&] { sdrt::Server::connect(path, options); }).status, SDRT_CANCELLED);
  close(first);
  close(listening);
  unlink(path.c_str());
  rmdir(folder);
}

TEST(cancelling) {
  std::promise<void> asked_for;
  std::atomic<int> gone{0};
  FakeServer fake(pictures([&](int socket, const std::string &) {
    FakeServer::send_all(socket, kWhole.substr(0, 200));
    hang(socket);
    ++gone;
  }));
  const sdrt::Server server = sdrt::Server::connect(fake.path());
  sdrt::Params params = star();
  sdrt::Cancellation cancellation;
  params.cancellation = &cancellation;
  std::promise<void> begun;
  params.progress = [&](const sdrt_progress &progress) {
    if (progress.event == SDRT_ACCEPTED) {
      begun.set_value();
    }
    return true;
  };
  auto running = std::async(std::launch::async, [&] { return outcome([&] { server.generate(params); }); });
  begun.get_future().wait();
  cancellation.cancel();
  CHECK_EQUAL(running.get().status, SDRT_CANCELLED);
  cancellation.cancel();
  params.progress = nullptr;
  CHECK_EQUAL(outcome([&] { server.generate(params); }).status, SDRT_CANCELLED);
  while (gone < 1) {  // the connection is closed, which is what stops a server
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  sdrt_cancel(nullptr);
}

TEST(progress_functions_cancel_and_throw) {
  FakeServer fake(pictures(kWhole));
  const sdrt::Server server = sdrt::Server::connect(fake.path());
  for (const sdrt_event event : {SDRT_ACCEPTED, SDRT_STEP, SDRT_PREVIEW, SDRT_IMAGE}) {
    sdrt::Params params = star();
    params.progress = [&](const sdrt_progress &progress) { return progress.event != event; };
    CHECK_EQUAL(outcome([&] { server.generate(params); }).status, SDRT_CANCELLED);
    params.progress = [&](const sdrt_progress &progress) -> bool {
      if (progress.event == event) {
        throw std::out_of_range("mine");
      }
      return true;
    };
    bool caught = false;
    try {
      server.generate(params);
    } catch (const std::out_of_range &) {
      caught = true;
    }
    CHECK(caught);
  }
}

TEST(cancelling_in_a_signal_handler) {
  FakeServer fake(pictures([](int socket, const std::string &) { hang(socket); }));
  const sdrt::Server server = sdrt::Server::connect(fake.path());
  static sdrt_cancellation *fired = nullptr;
  sdrt::Cancellation cancellation;
  fired = cancellation.get();
  struct sigaction action = {};
  struct sigaction before = {};
  action.sa_handler = [](int) { sdrt_cancel(fired); };
  sigaction(SIGUSR1, &action, &before);
  sdrt::Params params = star();
  params.cancellation = &cancellation;
  const pthread_t self = pthread_self();
  std::thread signaller([self] {
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
    pthread_kill(self, SIGUSR1);
  });
  CHECK_EQUAL(outcome([&] { server.generate(params); }).status, SDRT_CANCELLED);
  signaller.join();
  sigaction(SIGUSR1, &before, nullptr);
}

TEST(signals_interrupt_nothing) {
  struct sigaction action = {};
  struct sigaction before = {};
  action.sa_handler = [](int) { ++alarms; };  // without SA_RESTART
  sigaction(SIGALRM, &action, &before);
  const itimerval often = {{0, 2000}, {0, 2000}};
  const itimerval never = {};
  {
    FakeServer fake(pictures([](int socket, const std::string &) {
      sigset_t alarm;
      sigemptyset(&alarm);
      sigaddset(&alarm, SIGALRM);
      pthread_sigmask(SIG_BLOCK, &alarm, nullptr);
      for (std::size_t at = 0; at < kWhole.size(); at += 50) {
        FakeServer::send_all(socket, kWhole.substr(at, 50));
        std::this_thread::sleep_for(std::chrono::milliseconds(5));
      }
    }));
    const sdrt::Server server = sdrt::Server::connect(fake.path());
    setitimer(ITIMER_REAL, &often, nullptr);
    const Outcome found = outcome([&] { server.generate(star()); });
    setitimer(ITIMER_REAL, &never, nullptr);
    CHECK_EQUAL(found.message, "");
    CHECK(alarms > 0);
  }
  sigaction(SIGALRM, &before, nullptr);
}

TEST(closing_ends_calls_that_run) {
  std::atomic<int> asked_for{0};
  FakeServer fake(pictures([&](int socket, const std::string &) {
    ++asked_for;
    hang(socket);
  }));
  sdrt::Server server = sdrt::Server::connect(fake.path());
  sdrt_server *const handle = server.get();
  std::vector<std::future<sdrt_status>> running;
  for (int i = 0; i < 4; ++i) {
    running.push_back(std::async(std::launch::async, [handle] {
      sdrt_params params = sdrt_default_params();
      params.prompt = "a star";
      sdrt_result *result = nullptr;
      return sdrt_generate(handle, &params, &result, nullptr);
    }));
  }
  while (asked_for < 4) {
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  server.close();
  for (std::future<sdrt_status> &each : running) {
    CHECK_EQUAL(each.get(), SDRT_CLOSED);
  }
}

TEST(memory_of_the_callers) {
  FakeServer fake(pictures(kWhole));
  const sdrt::Server server = sdrt::Server::connect(fake.path());
  std::vector<std::uint8_t> memory(kPixels + 2, 7);
  sdrt::Params params = star();
  params.pixels = memory.data() + 1;
  params.pixels_size = kPixels;
  const sdrt::Result result = server.generate(params);
  CHECK(result[0].pixels == memory.data() + 1);
  CHECK(std::string(memory.begin() + 1, memory.end() - 1) == kPixelBytes);
  CHECK(memory.front() == 7 && memory.back() == 7);
  params.pixels_size = kPixels - 1;
  const Outcome small = outcome([&] { server.generate(params); });
  CHECK_EQUAL(small.status, SDRT_INVALID_ARGUMENT);
  CHECK_EQUAL(small.message, "pixels_size is 191: expected at least 192");
}

TEST(shared_memory) {
  const std::string name = "/sdrt-test-" + std::to_string(getpid());
  const int object = shm_open(name.c_str(), O_RDWR | O_CREAT | O_EXCL, 0600);
  CHECK(object >= 0 && ftruncate(object, 8192) == 0);
  {
    const sdrt::Buffer mine(5000);
    CHECK_EQUAL(mine.size(), 5000u);
    CHECK_EQUAL(static_cast<const char *>(mine.data())[4999], '\0');
    const sdrt::Buffer buffer = sdrt::Buffer::attach(name, 8192);
    // A fake server's pixels do not come this way: those are seen to be where they are not asked for.
    FakeServer fake(pictures(chunked(accepted() + image(0, 1, "") + done())));
    const sdrt::Server server = sdrt::Server::connect(fake.path());
    sdrt::Params params = star();
    params.pixels_buffer = &buffer;
    params.pixels_offset = 100;
    const sdrt::Result result = server.generate(params);
    CHECK(result[0].pixels == static_cast<std::uint8_t *>(buffer.data()) + 100);
    const std::string body = fake.requests().back();
    CHECK(body.find("\"pixels\":{\"key\":\"" + name + "\",\"offset\":100,\"byte_size\":8092}") != std::string::npos);
    params.pixels_offset = 8192 - 10;
    CHECK_EQUAL(outcome([&] { server.generate(params); }).status, SDRT_PROTOCOL);
    params.pixels_offset = 8192;
    CHECK_EQUAL(outcome([&] { server.generate(params); }).status, SDRT_INVALID_ARGUMENT);
    params.pixels_buffer = nullptr;
    params.latents_buffer = &buffer;
    CHECK_EQUAL(outcome([&] { server.generate(params); }).status, SDRT_INVALID_ARGUMENT);
    params.width = params.height = 256;
    CHECK_EQUAL(outcome([&] { server.generate(params); }).status, SDRT_INVALID_ARGUMENT);
  }
  CHECK_EQUAL(outcome([&] { sdrt::Buffer::attach(name, 8193); }).status, SDRT_INVALID_ARGUMENT);
  CHECK_EQUAL(outcome([&] { sdrt::Buffer::attach(name, 0); }).status, SDRT_INVALID_ARGUMENT);
  shm_unlink(name.c_str());
  close(object);
  CHECK_EQUAL(outcome([&] { sdrt::Buffer::attach(name, 1); }).status, SDRT_SYSTEM);
  CHECK_EQUAL(outcome([] { sdrt::Buffer(0); }).status, SDRT_INVALID_ARGUMENT);
  CHECK_EQUAL(outcome([] { sdrt::Buffer(std::size_t{1} << 50); }).status, SDRT_OUT_OF_MEMORY);
}

TEST(arguments_that_make_no_sense) {
  FakeServer fake(pictures(kWhole));
  const sdrt::Server held = sdrt::Server::connect(fake.path());
  sdrt_server *const server = held.get();
  sdrt_error error = SDRT_ERROR_INIT;
  sdrt_result *result = nullptr;
  const auto generate = [&](const sdrt_params &params) {
    const sdrt_status status = sdrt_generate(server, &params, &result, &error);
    CHECK_EQUAL(error.status, status);
    CHECK((result == nullptr) == (status != SDRT_OK));
    sdrt_result_free(result);
    return status;
  };
  sdrt_params params = sdrt_default_params();
  CHECK_EQUAL(generate(params), SDRT_INVALID_ARGUMENT);
  CHECK_EQUAL(std::string(error.message), "prompt is NULL: expected a string");
  params.prompt = "a star";
  CHECK_EQUAL(generate(params), SDRT_OK);
  CHECK_EQUAL(std::string(error.message), "");
  const auto with = [&](auto change) {
    sdrt_params changed = params;
    change(&changed);
    return generate(changed);
  };
  CHECK_EQUAL(with([](sdrt_params *p) { p->struct_size = 0; }), SDRT_INVALID_ARGUMENT);
  CHECK_EQUAL(with([](sdrt_params *p) { p->struct_size -= 8; }), SDRT_INVALID_ARGUMENT);
  CHECK_EQUAL(with([](sdrt_params *p) { p->images = 11; }), SDRT_INVALID_ARGUMENT);
  CHECK_EQUAL(with([](sdrt_params *p) { p->clip_skip = -2; }), SDRT_INVALID_ARGUMENT);
  CHECK_EQUAL(with([](sdrt_params *p) { p->guidance_scale = std::nan(""); }), SDRT_INVALID_ARGUMENT);
  CHECK_EQUAL(with([](sdrt_params *p) { p->eta = HUGE_VAL; }), SDRT_INVALID_ARGUMENT);
  CHECK_EQUAL(with([](sdrt_params *p) { p->guidance_interval[1] = HUGE_VAL; }), SDRT_INVALID_ARGUMENT);
  CHECK_EQUAL(sdrt_generate(nullptr, &params, &result, &error), SDRT_INVALID_ARGUMENT);
  CHECK_EQUAL(sdrt_generate(server, nullptr, &result, &error), SDRT_INVALID_ARGUMENT);
  CHECK_EQUAL(sdrt_generate(server, &params, nullptr, &error), SDRT_INVALID_ARGUMENT);
  sdrt_open_options options = sdrt_default_open_options();
  sdrt_server *opened = nullptr;
  CHECK_EQUAL(sdrt_open(&options, &opened, nullptr), SDRT_INVALID_ARGUMENT);
  options.address = options.bundle = "demo";
  CHECK_EQUAL(sdrt_open(&options, &opened, nullptr), SDRT_INVALID_ARGUMENT);
  CHECK_EQUAL(sdrt_open(nullptr, &opened, nullptr), SDRT_INVALID_ARGUMENT);
  CHECK_EQUAL(sdrt_open(&options, nullptr, nullptr), SDRT_INVALID_ARGUMENT);
  CHECK_EQUAL(sdrt_list_models(nullptr, nullptr, nullptr), SDRT_INVALID_ARGUMENT);
  CHECK_EQUAL(sdrt_cancellation_create(nullptr, nullptr), SDRT_INVALID_ARGUMENT);
  CHECK_EQUAL(sdrt_buffer_attach(nullptr, 1, nullptr, nullptr), SDRT_INVALID_ARGUMENT);
  sdrt_close(nullptr);
  sdrt_models_free(nullptr);
  sdrt_result_free(nullptr);
  sdrt_buffer_free(nullptr);
  sdrt_cancellation_free(nullptr);
  CHECK_EQUAL(sdrt_models_count(nullptr) + sdrt_result_count(nullptr) + sdrt_buffer_size(nullptr), 0u);
  CHECK_EQUAL(sdrt_server_process(nullptr), 0);
  CHECK_EQUAL(std::string(sdrt_result_settings(nullptr)), "");
  sdrt_image none = sdrt_default_image();
  CHECK_EQUAL(sdrt_result_image(nullptr, 0, &none), SDRT_INVALID_ARGUMENT);
}

TEST(structures_grow) {
  FakeServer fake(pictures(kWhole));
  const sdrt::Server held = sdrt::Server::connect(fake.path());
  struct Later {
    sdrt_params params;
    std::uint64_t news;
  } later = {sdrt_default_params(), 0};
  later.params.struct_size = sizeof later;
  later.params.prompt = "a star";
  sdrt_result *result = nullptr;
  sdrt_error error = SDRT_ERROR_INIT;
  CHECK_EQUAL(sdrt_generate(held.get(), &later.params, &result, &error), SDRT_OK);
  // A program that knows of less, and one that knows of more, are both given what they have room for.
  struct Grown {
    sdrt_image image;
    std::uint64_t news;
  } grown = {sdrt_default_image(), 77};
  grown.image.struct_size = sizeof grown;
  CHECK_EQUAL(sdrt_result_image(result, 0, &grown.image), SDRT_OK);
  CHECK_EQUAL(grown.image.struct_size, sizeof grown);
  CHECK_EQUAL(grown.news, 77u);
  CHECK_EQUAL(grown.image.seed, 42u);
  sdrt_image less = sdrt_default_image();
  less.struct_size = offsetof(sdrt_image, seed);
  CHECK_EQUAL(sdrt_result_image(result, 0, &less), SDRT_OK);
  CHECK_EQUAL(less.width, 8u);
  CHECK_EQUAL(less.seed, 0u);
  CHECK_EQUAL(sdrt_result_image(result, 1, &less), SDRT_INVALID_ARGUMENT);
  sdrt_result_free(result);
  later.news = 1;
  CHECK_EQUAL(sdrt_generate(held.get(), &later.params, &result, &error), SDRT_INVALID_ARGUMENT);
  CHECK(std::string(error.message).find("does not know") != std::string::npos);
  // A text that does not fit is cut, and between characters.
  FakeServer wordy(pictures(answer(400, "{\"error\": {\"message\": \"x" + [] {
    std::string text;
    for (int i = 0; i < 1000; ++i) {
      text += "\xC3\xA4";
    }
    return text;
  }() + "\"}}")));
  const sdrt::Server other = sdrt::Server::connect(wordy.path());
  later.news = 0;
  CHECK_EQUAL(sdrt_generate(other.get(), &later.params, &result, &error), SDRT_INVALID_ARGUMENT);
  CHECK_EQUAL(std::strlen(error.message), 1019u);
  error.struct_size = offsetof(sdrt_error, message) + 7;
  CHECK_EQUAL(sdrt_generate(other.get(), &later.params, &result, &error), SDRT_INVALID_ARGUMENT);
  CHECK_EQUAL(std::string(error.message), "x\xC3\xA4\xC3\xA4");
}

TEST(statuses_have_names) {
  for (int status = SDRT_OK; status <= SDRT_SYSTEM; ++status) {
    CHECK(std::string(sdrt_status_name(static_cast<sdrt_status>(status))) != "unknown");
  }
  CHECK_EQUAL(sdrt_api_level(), 1u);
  CHECK(std::string(sdrt_version()).find('.') != std::string::npos);
}

TEST(many_threads_use_one_handle) {
  FakeServer fake(pictures(kWhole));
  const sdrt::Server server = sdrt::Server::connect(fake.path());
  std::vector<std::future<void>> running;
  for (int i = 0; i < 8; ++i) {
    running.push_back(std::async(std::launch::async, [&] {
      for (unsigned round = 0; round < 12 / share(); ++round) {
        CHECK_EQUAL(server.models().size(), 1u);
        CHECK(server.generate(star())[0].pixels[1] == 5);
      }
    }));
  }
  for (std::future<void> &each : running) {
    each.get();
  }
}

int main(int count, char **words) { return check::run_all(count, words); }
