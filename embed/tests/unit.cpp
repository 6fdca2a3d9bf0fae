// The library's own parts: JSON, addresses, HTTP, frames. What comes from outside is tried whole, in pieces of every
// size, and cut at every place.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <string>

#include "address.hpp"
#include "check.hpp"
#include "failure.hpp"
#include "frames.hpp"
#include "http.hpp"
#include "json.hpp"
#include "waiting.hpp"

using namespace sdrt_internal;

namespace {

sdrt_status status_of(const std::function<void()> &work) {
  try {
    work();
  } catch (const Failure &failure) {
    CHECK(!failure.message.empty());
    return failure.status;
  }
  return SDRT_OK;
}

// Gives a text in pieces of at most so many bytes.
Source in_pieces(std::string text, std::size_t piece) {
  return [text, piece, at = std::size_t{0}](void *to, std::size_t size) mutable {
    const std::size_t count = std::min({piece, size, text.size() - at});
    std::memcpy(to, text.data() + at, count);
    at += count;
    return count;
  };
}

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

}  // namespace

TEST(json_is_read) {
  const Json found = Json::parse(
      " {\"a\": [1, -2.5e3, true, false, null], \"t\": \"x\\\"\\\\\\/\\b\\f\\n\\r\\t\\u00e4\\ud83d\\ude00\", \"o\": {}} ");
  CHECK_EQUAL(found["a"].items().size(), 5u);
  CHECK_EQUAL(found["a"].items()[1].number(), -2500.0);
  CHECK(found["a"].items()[2].kind() == Json::Kind::kBoolean);
  CHECK_EQUAL(found["a"].items()[2].number(), 1.0);
  CHECK(found["a"].items()[4].kind() == Json::Kind::kNull);
  CHECK_EQUAL(found["t"].text(), "x\"\\/\b\f\n\r\t\u00e4\U0001F600");
  CHECK(found["o"].kind() == Json::Kind::kObject);
  CHECK(found["nothing"]["at"]["all"].kind() == Json::Kind::kNull);
  CHECK_EQUAL(Json::parse("\"\\ud800\"").text(), "\uFFFD");
  CHECK_EQUAL(Json::parse("\"\\ud800x\\udc00\\ud800\\u0041\"").text(), "\uFFFDx\uFFFD\uFFFDA");
}

TEST(what_is_no_json_is_refused) {
  for (const char *text : {"", " ", "{", "}", "[", "[1", "[1,", "[1,]", "{\"a\"", "{\"a\":", "{\"a\":1", "{\"a\":1,}",
                           "{a:1}", "\"", "\"\\", "\"\\x\"", "\"\\u12\"", "\"\\u12g4\"", "\"\n\"", "tru", "nul", "1 2",
                           "01x", "-", "+1", ".5", "1e999", "NaN", "inf", "nan", "'a'", "\xff"}) {
    CHECK_EQUAL(status_of([&] { Json::parse(text); }), SDRT_PROTOCOL);
  }
  CHECK_EQUAL(status_of([] { Json::parse(std::string(100000, '[')); }), SDRT_PROTOCOL);
  CHECK_EQUAL(status_of([] { Json::parse(std::string("1\0", 2)); }), SDRT_PROTOCOL);
}

TEST(json_is_written) {
  JsonObject object;
  object.add("t", std::string("a\"\\\n\x01\u00e4")).add("n", std::uint64_t{18446744073709551615u}).add("d", 0.1);
  CHECK_EQUAL(object.text(), "{\"t\":\"a\\\"\\\\\\u000a\\u0001\u00e4\",\"n\":18446744073709551615,\"d\":0.1}");
  for (const double number : {0.1, 1e300, -1e-300, 7.5, 1.0 / 3}) {
    CHECK_EQUAL(Json::parse(json_number(number)).number(), number);
  }
}

TEST(addresses) {
  const auto read = [](const char *text) {
    const Address found = parse_address(text);
    return found.path + "|" + found.host + "|" + found.port + "|" + found.host_header();
  };
  CHECK_EQUAL(read("127.0.0.1:80"), "|127.0.0.1|80|127.0.0.1:80");
  CHECK_EQUAL(read("http://localhost:7860/"), "|localhost|7860|localhost:7860");
  CHECK_EQUAL(read("gpu-server"), "|gpu-server|7860|gpu-server:7860");
  CHECK_EQUAL(read("[::1]:80"), "|::1|80|[::1]:80");
  CHECK_EQUAL(read("[::1]"), "|::1|7860|[::1]:7860");
  CHECK_EQUAL(read("/run/a.sock"), "/run/a.sock|||sdrt");
  CHECK_EQUAL(read("unix:a.sock"), "a.sock|||sdrt");
  for (const char *text : {"", ":80", "a:", "a:0", "a:65536", "a:123456", "a:8x", "::1", "::1:80", "[::1", "[::1]80",
                           "[]:80", "unix:", "https://a:80", "a b:80", "a/b", "a\r\nX: y:80"}) {
    CHECK_EQUAL(status_of([&] { parse_address(text); }), SDRT_INVALID_ARGUMENT);
  }
  CHECK_EQUAL(status_of([] { parse_address("/" + std::string(200, 'x')); }), SDRT_INVALID_ARGUMENT);
}

TEST(answers_are_read_in_pieces_of_any_size) {
  const std::string bodies[] = {
      "Content-Length: 11\r\n\r\nhello world",
      "Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n6;x=y\r\n world\r\n0\r\nTrailer: x\r\n\r\n",
      "transfer-encoding: Chunked\r\n\r\nb\r\nhello world\r\n0\r\n\r\n",
      "X: y\r\n\r\nhello world",
  };
  for (const std::string &body : bodies) {
    for (const char *before : {"", "HTTP/1.1 100 Continue\r\n\r\n"}) {
      for (std::size_t piece = 1; piece < 100; ++piece) {
        Response response(in_pieces(before + ("HTTP/1.1 200 OK\r\nA:  b \r\n" + body), piece));
        CHECK_EQUAL(response.status(), 200);
        CHECK_EQUAL(response.header("a"), "b");
        CHECK_EQUAL(response.rest(100), "hello world");
        char more = 0;
        CHECK_EQUAL(response.read(&more, 1), 0u);
      }
    }
  }
  Response bare(in_pieces("HTTP/1.1 404\nContent-Length: 0\n\n", 7));
  CHECK_EQUAL(bare.status(), 404);
  CHECK_EQUAL(bare.rest(1), "");
  Response nothing(in_pieces("HTTP/1.0 204 No Content\r\n\r\n", 100));
  CHECK_EQUAL(nothing.rest(1), "");
}

TEST(large_bodies_come_whole) {
  std::string body;
  for (int i = 0; i < 200000; ++i) {
    body.push_back(static_cast<char>(i * 7));
  }
  std::string chunked = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n";
  for (std::size_t at = 0, size = 1; at < body.size(); at += size, size = size * 3 % 70001) {
    size = std::min(size, body.size() - at);
    char head[20];
    std::snprintf(head, sizeof head, "%zx\r\n", size);
    chunked += head + body.substr(at, size) + "\r\n";
  }
  chunked += "0\r\n\r\n";
  for (const std::size_t piece : {1000u, 16384u, 100000u}) {
    Response response(in_pieces(chunked, piece));
    std::string found(body.size(), '\0');
    response.read_all(&found[0], found.size());
    CHECK(found == body);
    CHECK_EQUAL(response.rest(1), "");
  }
  Response response(in_pieces(chunked, 4096));
  CHECK_EQUAL(status_of([&] { response.rest(1000); }), SDRT_PROTOCOL);
}

TEST(what_is_no_http_is_refused) {
  for (const char *text : {"SSH-2.0-OpenSSH_9.2\r\n\r\n", "HTTP/2 200\r\n\r\n", "HTTP/1.1 abc OK\r\n\r\n",
                           "HTTP/1.1 999 OK\r\n\r\n", "HTTP/1.1 099 OK\r\n\r\n", "HTTP/1.1 2000\r\n\r\n",
                           "HTTP/1.1 200 OK\r\nno colon\r\n\r\n", "HTTP/1.1 200 OK\r\n: empty\r\n\r\n",
                           "HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n",
                           "HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
                           "HTTP/1.1 200 OK\r\nContent-Length: 99999999999999999999\r\n\r\n",
                           "HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\n"}) {
    CHECK_EQUAL(status_of([&] { Response(in_pieces(text, 1000)); }), SDRT_PROTOCOL);
  }
  for (const char *chunks : {"\r\n", "x\r\n", "-1\r\n", "fffffffffffffffff\r\n", "1\r\nab\r\n0\r\n\r\n", "1\r\naXYZ"}) {
    Response response(in_pieces(std::string("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n") + chunks, 1000));
    CHECK_EQUAL(status_of([&] { response.rest(1000); }), SDRT_PROTOCOL);
  }
  CHECK_EQUAL(status_of([] { Response(in_pieces(std::string(100000, 'x'), 1000)); }), SDRT_PROTOCOL);
  std::string many = "HTTP/1.1 200 OK\r\n";
  for (int i = 0; i < 1000; ++i) {
    many += "A: b\r\n";
  }
  CHECK_EQUAL(status_of([&] { Response(in_pieces(many + "\r\n", 1000)); }), SDRT_PROTOCOL);
  std::string interim;
  for (int i = 0; i < 100; ++i) {
    interim += "HTTP/1.1 102 Processing\r\n\r\n";
  }
  CHECK_EQUAL(status_of([&] { Response(in_pieces(interim, 1000)); }), SDRT_PROTOCOL);
}

TEST(answers_that_are_cut_short) {
  for (const char *form : {"Content-Length: 5\r\n\r\nhello", "Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n"}) {
    const std::string whole = std::string("HTTP/1.1 200 OK\r\n") + form;
    for (std::size_t size = 0; size < whole.size(); ++size) {
      CHECK_EQUAL(status_of([&] { Response(in_pieces(whole.substr(0, size), 9)).rest(100); }), SDRT_CONNECTION);
    }
  }
}

TEST(requests) {
  CHECK_EQUAL(request_text("/a", "h:1", "", ""),
              "GET /a HTTP/1.1\r\nHost: h:1\r\nUser-Agent: sdrt-embed/" SDRT_VERSION "\r\nConnection: close\r\n\r\n");
  const std::string post = request_text("/a", "h:1", "key", "{}");
  CHECK(post.find("POST /a HTTP/1.1\r\n") == 0);
  CHECK(post.find("\r\nAuthorization: Bearer key\r\n") != std::string::npos);
  CHECK(post.find("\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}") != std::string::npos);
}

TEST(frames_are_read) {
  double seconds = 0.25;
  std::uint64_t bits = 0;
  std::memcpy(&bits, &seconds, 8);
  const std::string stream = frame(1, 0, little(2, 4) + little(20, 4) + little(512, 4) + little(256, 4) + little(7, 4)) +
                             frame(99, 5, "of a later version") +
                             frame(2, 1, little(3, 4) + little(20, 4) + little(bits, 8) + little(bits, 8)) +
                             frame(3, 1, little(3, 4) + little(20, 4) + little(1, 4) + little(2, 4) + "abcdef") +
                             frame(4, 0, little(1ull << 63, 8) + little(2, 4) + little(1, 4) + little(0, 4) +
                                             little(4, 4) + "textuvwxyz") +
                             frame(7, 0, "") + frame(6, 0, little(429, 4) + "{}") + frame(5, 0, "{\"a\": 1}");
  for (std::size_t piece = 1; piece < 60; ++piece) {
    Response response(in_pieces("HTTP/1.1 200 OK\r\n\r\n" + stream, piece));
    FrameReader frames(&response);
    CHECK(frames.next() == FrameKind::kAccepted);
    const Accepted accepted = frames.accepted();
    frames.end();
    CHECK_EQUAL(accepted.images, 2u);
    CHECK_EQUAL(accepted.width, 512u);
    CHECK_EQUAL(accepted.height, 256u);
    CHECK_EQUAL(accepted.waiting, 7u);
    CHECK(frames.next() == FrameKind::kStep);
    CHECK_EQUAL(frames.image(), 1);
    const StepDone step = frames.step();
    CHECK_EQUAL(step.step, 3u);
    CHECK_EQUAL(step.seconds, 0.25);
    CHECK(frames.next() == FrameKind::kPreview);
    CHECK_EQUAL(frames.preview().height, 2u);
    std::uint8_t pixels[6];
    frames.pixels(pixels, 6);
    CHECK_EQUAL(std::string(pixels, pixels + 6), "abcdef");
    CHECK(frames.next() == FrameKind::kImage);
    const ImageHead head = frames.image_head();
    CHECK_EQUAL(head.seed, 1ull << 63);
    CHECK_EQUAL(frames.text(head.text_size), "text");
    frames.pixels(pixels, 6);
    frames.end();
    CHECK(frames.next() == FrameKind::kAtWork);
    CHECK(frames.next() == FrameKind::kError);
    CHECK_EQUAL(frames.error_status(), 429u);
    CHECK(frames.next() == FrameKind::kDone);
    CHECK_EQUAL(frames.text(), "{\"a\": 1}");
    CHECK_EQUAL(status_of([&] { frames.next(); }), SDRT_CONNECTION);
  }
}

TEST(frames_that_lie_are_refused) {
  const auto first = [](const std::string &stream, const std::function<void(FrameReader *)> &read) {
    return status_of([&] {
      Response response(in_pieces("HTTP/1.1 200 OK\r\n\r\n" + stream, 1000));
      FrameReader frames(&response);
      frames.next();
      read(&frames);
    });
  };
  CHECK_EQUAL(first(frame(2, 0, "short"), [](FrameReader *frames) { frames->step(); }), SDRT_PROTOCOL);
  CHECK_EQUAL(first(frame(7, 0, "long"), [](FrameReader *frames) { frames->end(); }), SDRT_PROTOCOL);
  CHECK_EQUAL(first(little(0xFFFFFFFF, 4) + little(5, 4), [](FrameReader *frames) { frames->text(); }), SDRT_PROTOCOL);
  CHECK_EQUAL(first(frame(5, 0, "abc"), [](FrameReader *frames) { frames->text(4); }), SDRT_PROTOCOL);
  std::uint8_t pixels[6];
  CHECK_EQUAL(first(frame(3, 0, "abcde"), [&](FrameReader *frames) { frames->pixels(pixels, 6); }), SDRT_PROTOCOL);
  CHECK_EQUAL(first(frame(3, 0, "abcdefg"), [&](FrameReader *frames) { frames->pixels(pixels, 6); }), SDRT_PROTOCOL);
  CHECK_EQUAL(status_of([] { picture_bytes(0, 8); }), SDRT_PROTOCOL);
  CHECK_EQUAL(status_of([] { picture_bytes(65536, 65536); }), SDRT_PROTOCOL);
  CHECK_EQUAL(status_of([] { picture_bytes(0xFFFFFFFF, 1); }), SDRT_PROTOCOL);
  CHECK_EQUAL(picture_bytes(512, 512), 786432u);
}

TEST(deadlines) {
  CHECK_EQUAL(Deadline().poll_timeout(), -1);
  CHECK(!Deadline().passed());
  const Deadline soon(1, "it was not done");
  CHECK(Deadline(60000, "").poll_timeout() > 59000);
  Patience patience;
  CHECK(!patience.wait(-1, 0, soon));
  CHECK(soon.passed());
  CHECK_EQUAL(soon.poll_timeout(), 0);
  patience.deadline = soon;
  CHECK_EQUAL(status_of([&] { patience.sleep(1000); }), SDRT_TIMEOUT);
}

int main(int count, char **words) { return check::run_all(count, words); }
