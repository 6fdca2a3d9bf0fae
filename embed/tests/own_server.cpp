// Servers of the library's own, from their start to their end, whichever way it comes.
#include <dirent.h>
#include <fcntl.h>
#include <signal.h>
#include <spawn.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <fstream>
#include <future>
#include <mutex>
#include <thread>

#include "check.hpp"
#include "pictures.hpp"
#include "sdrt.hpp"

extern char **environ;

namespace {

using Clock = std::chrono::steady_clock;

template <typename Work>
sdrt::Error error_of(Work work) {
  try {
    work();
  } catch (const sdrt::Error &error) {
    return error;
  }
  throw check::Failed("no error came");
}

template <typename Condition>
bool comes_true(Condition condition) {
  for (const auto end = Clock::now() + std::chrono::seconds(60); Clock::now() < end;) {
    if (condition()) {
      return true;
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
  }
  return false;
}

std::vector<std::string> open_files(std::int64_t process) {
  const std::string folder = "/proc/" + std::to_string(process) + "/fd";
  std::vector<std::string> found;
  DIR *const entries = opendir(folder.c_str());
  CHECK(entries != nullptr);
  while (const dirent *entry = readdir(entries)) {
    char target[512];
    const ssize_t size = readlink((folder + "/" + entry->d_name).c_str(), target, sizeof target);
    if (size > 0) {
      found.emplace_back(target, static_cast<std::size_t>(size));
    }
  }
  closedir(entries);
  return found;
}

std::string state_of(std::int64_t process, const std::string &field) {
  std::ifstream file("/proc/" + std::to_string(process) + "/status");
  const std::string text(std::istreambuf_iterator<char>(file), {});
  if (text.empty()) {
    return "Z";  // it has gone between two looks
  }
  const std::size_t begin = text.find("\n" + field + ":\t") + field.size() + 3;
  return text.substr(begin, text.find('\n', begin) - begin);
}

// One that has ended and that nobody has waited for yet does not live.
bool lives(std::int64_t process) {
  return kill(static_cast<pid_t>(process), 0) == 0 && state_of(process, "State")[0] != 'Z';
}

// Folders for sockets that are there.
int folders() {
  int count = 0;
  DIR *const entries = opendir(check::setting("TMPDIR").c_str());
  CHECK(entries != nullptr);
  while (const dirent *entry = readdir(entries)) {
    count += std::string(entry->d_name).compare(0, 5, "sdrt-") == 0;
  }
  closedir(entries);
  return count;
}

// A program that stands in for sdrt where it shall not come up.
std::string script(const std::string &name, const std::string &text) {
  const std::string path = check::setting("TMPDIR") + "/" + name;
  std::ofstream(path) << "#!/bin/sh\n" << text << "\n";
  chmod(path.c_str(), 0700);
  return path;
}

std::mutex log_lock;
std::string logged;

void keep(const char *line, void *user) {
  const std::lock_guard<std::mutex> lock(log_lock);
  logged += std::string(line) + static_cast<const char *>(user);
}

}  // namespace

TEST(from_its_start_to_a_crash) {
  // What a process may have that its server is to know nothing of.
  const std::string secret = script("secret", "");
  const int leaked = open(secret.c_str(), O_RDONLY);  // without O_CLOEXEC
  sigset_t blocked;
  sigset_t before;
  sigemptyset(&blocked);
  sigaddset(&blocked, SIGTERM);
  pthread_sigmask(SIG_BLOCK, &blocked, &before);
  signal(SIGINT, SIG_IGN);
  static char newline[] = "\n";
  sdrt::Options options;
  options.api_key = "open-sesame";
  options.arguments = {"--at-once", "1", "--queue", "1"};
  options.log = keep;
  options.log_user = newline;
  sdrt::Server server = sdrt::Server::start("demo", options);
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
  signal(SIGINT, SIG_DFL);

  const std::int64_t process = server.process();
  CHECK(lives(process));
  CHECK_EQUAL(folders(), 1);
  for (const std::string &file : open_files(process)) {
    CHECK(file != secret);
  }
  CHECK_EQUAL(std::stoull(state_of(process, "SigBlk"), nullptr, 16), 0u);
  CHECK_EQUAL(std::stoull(state_of(process, "SigIgn"), nullptr, 16) >> (SIGINT - 1) & 1, 0u);
  CHECK(getpgid(static_cast<pid_t>(process)) == process);
  CHECK_EQUAL(server.models().at(0).name, "demo");

  const Expected expected = expected_pictures().at(0);
  const sdrt::Buffer buffer(expected.pixels.size());
  sdrt::Params params = expected.params;
  params.pixels_buffer = &buffer;
  CHECK(pixels_of(server.generate(params)[0]) == expected.pixels);

  // One is made and one waits; there is no place for a third.
  sdrt::Params endless;
  endless.prompt = "a star";
  endless.steps = 1000;
  endless.sampler = "ddim";
  std::promise<void> made;
  std::promise<void> waits;
  const auto ask = [&](std::promise<void> *begun, sdrt_event when) {
    sdrt::Params mine = endless;
    bool told = false;
    mine.progress = [&](const sdrt_progress &progress) {
      if (progress.event == when && !told) {
        told = true;
        begun->set_value();
      }
      return true;
    };
    return error_of([&] { server.generate(mine); });
  };
  auto first = std::async(std::launch::async, [&] { return ask(&made, SDRT_STEP); });
  made.get_future().wait();
  auto second = std::async(std::launch::async, [&] { return ask(&waits, SDRT_ACCEPTED); });
  waits.get_future().wait();
  const sdrt::Error full = error_of([&] { server.generate(endless); });
  CHECK_EQUAL(full.status(), SDRT_QUEUE_FULL);
  CHECK(full.retry_after().count() > 0);

  kill(static_cast<pid_t>(process), SIGKILL);
  const sdrt::Error died = first.get();
  CHECK_EQUAL(died.status(), SDRT_SERVER_DIED);
  CHECK_EQUAL(std::string(died.what()), "the server died: it was ended by signal 9 (Killed): open another");
  CHECK_EQUAL(second.get().status(), SDRT_SERVER_DIED);
  CHECK_EQUAL(error_of([&] { server.models(); }).status(), SDRT_SERVER_DIED);
  CHECK(!lives(process));
  server.close();
  CHECK_EQUAL(folders(), 0);
  close(leaked);
  const std::lock_guard<std::mutex> lock(log_lock);
  CHECK(logged.find("demo is ready") != std::string::npos);
}

TEST(closing_ends_it) {
  sdrt::Server server = sdrt::Server::start("demo");
  const std::int64_t process = server.process();
  sdrt::Params params = expected_pictures().at(0).params;
  const sdrt::Buffer buffer(expected_pictures().at(0).pixels.size());
  params.pixels_buffer = &buffer;
  {
    // A fork that frees what it has does the parent no harm.
    const pid_t child = fork();
    if (child == 0) {
      sdrt_buffer_free(buffer.get());
      sdrt_close(server.get());
      execl("/bin/true", "true", nullptr);  // valgrind does not look for what else it had
      _exit(1);
    }
    int how = 1;
    waitpid(child, &how, 0);
    CHECK_EQUAL(how, 0);
    CHECK(pixels_of(server.generate(params)[0]) == expected_pictures().at(0).pixels);
  }
  std::promise<void> made;
  auto running = std::async(std::launch::async, [&, handle = server.get()] {
    sdrt_params endless = sdrt_default_params();
    endless.prompt = "a star";
    endless.steps = 1000;
    endless.sampler = "ddim";
    endless.progress_user = &made;
    endless.progress = [](const sdrt_progress *progress, void *user) {
      if (progress->event == SDRT_STEP && progress->step == 1) {
        static_cast<std::promise<void> *>(user)->set_value();
      }
      return 0;
    };
    sdrt_result *result = nullptr;
    return sdrt_generate(handle, &endless, &result, nullptr);
  });
  made.get_future().wait();
  const auto began = Clock::now();
  server.close();
  CHECK(Clock::now() - began < std::chrono::seconds(9));  // not by force
  CHECK_EQUAL(running.get(), SDRT_CLOSED);
  CHECK(!lives(process));
  CHECK_EQUAL(folders(), 0);
}

TEST(servers_that_cannot_start) {
  const auto start = [](const std::string &bundle, const std::string &program) {
    sdrt::Options options;
    options.program = program;
    return error_of([&] { sdrt::Server::start(bundle, options); });
  };
  const sdrt::Error missing = start("nothing", "");
  CHECK_EQUAL(missing.status(), SDRT_START_FAILED);
  CHECK(std::string(missing.what()).find("exit code 1: there is no bundle 'nothing'") != std::string::npos);
  const sdrt::Error no_program = start("demo", "/no/such/program");
  CHECK_EQUAL(no_program.status(), SDRT_START_FAILED);
  CHECK_EQUAL(std::string(no_program.what()), "\"/no/such/program\" cannot be started (No such file or directory)");
  const sdrt::Error silent = start("demo", script("silent", "exit 3"));
  CHECK_EQUAL(std::string(silent.what()), "the server could not start: it has ended with exit code 3");
  CHECK_EQUAL(folders(), 0);
}

TEST(servers_that_do_not_come_up) {
  const std::string hanging = script("hanging", "echo a line without an end >&2; exec sleep 1000");
  sdrt::Options options;
  options.program = hanging;
  options.start_timeout = std::chrono::milliseconds(300);
  CHECK_EQUAL(error_of([&] { sdrt::Server::start("demo", options); }).status(), SDRT_TIMEOUT);
  options.start_timeout.reset();
  sdrt::Cancellation cancellation;
  options.cancellation = &cancellation;
  std::thread canceller([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(100));
    cancellation.cancel();
  });
  CHECK_EQUAL(error_of([&] { sdrt::Server::start("demo", options); }).status(), SDRT_CANCELLED);
  canceller.join();
  CHECK_EQUAL(folders(), 0);
}

TEST(a_caller_that_ignores_its_children) {
  signal(SIGCHLD, SIG_IGN);
  const sdrt::Error failed = error_of([] { sdrt::Server::start("nothing"); });
  signal(SIGCHLD, SIG_DFL);
  CHECK_EQUAL(failed.status(), SDRT_START_FAILED);
  CHECK_EQUAL(folders(), 0);
}

// The last one, since a folder stays behind where a process is killed.
TEST(it_ends_with_its_parent) {
  int ends[2];
  CHECK(pipe2(ends, O_CLOEXEC) == 0);
  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  posix_spawn_file_actions_adddup2(&actions, ends[1], 1);
  const char *const words[] = {"/proc/self/exe", "--be-the-parent", nullptr};
  pid_t parent = 0;
  const int code = posix_spawn(&parent, words[0], &actions, nullptr, const_cast<char **>(words), environ);
  posix_spawn_file_actions_destroy(&actions);
  close(ends[1]);
  CHECK_EQUAL(code, 0);
  char text[32] = {};
  CHECK(read(ends[0], text, sizeof text - 1) > 0);
  close(ends[0]);
  const std::int64_t process = std::stoll(text);
  CHECK(lives(process));
  kill(parent, SIGKILL);
  waitpid(parent, nullptr, 0);
  CHECK(comes_true([&] { return !lives(process); }));
}

int main(int count, char **words) {
  if (count == 2 && std::string(words[1]) == "--be-the-parent") {
    const sdrt::Server server = sdrt::Server::start("demo");
    std::printf("%lld\n", static_cast<long long>(server.process()));
    std::fflush(stdout);
    pause();
  }
  return check::run_all(count, words);
}
