// Tests without a framework: TEST(name) { CHECK(...); }, and a main that runs them all, or those named on the command
// line, and watches that none leaves a descriptor open.
#ifndef SDRT_TESTS_CHECK_HPP
#define SDRT_TESTS_CHECK_HPP

#include <dirent.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace check {

struct Test {
  const char *name;
  void (*run)();
};

inline std::vector<Test> &tests() {
  static std::vector<Test> all;
  return all;
}

struct Registered {
  Registered(const char *name, void (*run)()) { tests().push_back({name, run}); }
};

struct Failed : std::runtime_error {
  using std::runtime_error::runtime_error;
};

template <typename One, typename Other>
void equal(const One &found, const Other &expected, const char *text, const char *file, int line) {
  if (!(found == expected)) {
    std::ostringstream message;
    message << file << ":" << line << ": " << text << ": found " << found << ", expected " << expected;
    throw Failed(message.str());
  }
}

inline void holds(bool value, const char *text, const char *file, int line) {
  if (!value) {
    throw Failed(std::string(file) + ":" + std::to_string(line) + ": " + text);
  }
}

inline int open_descriptors() {
  int count = 0;
  DIR *const folder = opendir("/proc/self/fd");
  while (readdir(folder) != nullptr) {
    ++count;
  }
  closedir(folder);
  return count;
}

inline std::string setting(const char *name) {
  const char *const value = std::getenv(name);
  return value == nullptr ? "" : value;
}

inline int run_all(int count, char **words) {
  int failed = 0;
  int run = 0;
  for (const Test &test : tests()) {
    bool wanted = count == 1;
    for (int i = 1; i < count; ++i) {
      wanted = wanted || std::strcmp(words[i], test.name) == 0;
    }
    if (!wanted) {
      continue;
    }
    ++run;
    std::printf("%s\n", test.name);
    std::fflush(stdout);
    const int before = open_descriptors();
    try {
      test.run();
      equal(open_descriptors(), before, "descriptors that are open", test.name, 0);
    } catch (const std::exception &error) {
      ++failed;
      std::printf("  failed: %s\n", error.what());
      std::fflush(stdout);
    }
  }
  std::printf("%d tests, %d failed\n", run, failed);
  return failed == 0 && run > 0 ? 0 : 1;
}

}  // namespace check

#define TEST(name)                                             \
  static void test_##name();                                   \
  static const check::Registered reg_##name(#name, test_##name); \
  static void test_##name()
#define CHECK(...) check::holds(static_cast<bool>(__VA_ARGS__), #__VA_ARGS__, __FILE__, __LINE__)
#define CHECK_EQUAL(found, expected) check::equal((found), (expected), #found, __FILE__, __LINE__)

#endif
