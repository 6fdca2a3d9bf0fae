#include "server_process.hpp"

#include <algorithm>
#include <array>
#include <cerrno>
#include <chrono>
#include <csignal>
#include <cstdlib>
#include <cstring>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <spawn.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include "failure.hpp"
#include "random_name.hpp"
#include "waiting.hpp"

extern char **environ;

namespace sdrt_internal {
namespace {

constexpr const char *kSocketName = "/server.sock";
constexpr std::size_t kLongestLine = 4096;
constexpr std::uint32_t kPatienceMs = 10000;
constexpr std::uint32_t kLastWordsMs = 500;
constexpr auto kLook = std::chrono::milliseconds(2);

// A folder that is this user's alone, in the first place that there is and whose paths fit into a socket's name.
std::string make_folder() {
  const char *const places[] = {std::getenv("XDG_RUNTIME_DIR"), std::getenv("TMPDIR"), "/tmp"};
  int number = 0;
  for (const char *const place : places) {
    if (place == nullptr || *place != '/') {
      continue;
    }
    const std::string folder = std::string(place) + "/sdrt-" + random_name().substr(0, 16);
    if (folder.size() + std::strlen(kSocketName) >= sizeof(sockaddr_un::sun_path)) {
      number = ENAMETOOLONG;
    } else if (mkdir(folder.c_str(), 0700) == 0) {
      return folder;
    } else {
      number = errno;
    }
  }
  throw system_failure("no folder for a socket can be made in XDG_RUNTIME_DIR, TMPDIR or /tmp", number);
}

// What is set for other servers is not for this one, which listens nowhere else and serves one bundle.
bool is_for_others(const char *entry) {
  static constexpr const char *kNames[] = {
      "SDRT_SERVE_BUNDLE=", "SDRT_SERVE_HOST=", "SDRT_SERVE_PORT=", "SDRT_SERVE_GRPC_PORT=", "SDRT_SERVE_UDS=",
      "SDRT_SERVE_PARENT=",
  };
  return std::any_of(std::begin(kNames), std::end(kNames),
                     [entry](const char *name) { return std::strncmp(entry, name, std::strlen(name)) == 0; });
}

std::vector<std::string> environment(const std::string &key) {
  std::vector<std::string> entries;
  for (char **each = environ; each != nullptr && *each != nullptr; ++each) {
    const bool replaced = !key.empty() && std::strncmp(*each, "SDRT_API_KEY=", 13) == 0;
    if (!is_for_others(*each) && !replaced) {
      entries.emplace_back(*each);
    }
  }
  if (!key.empty()) {
    entries.push_back("SDRT_API_KEY=" + key);
  }
  return entries;
}

std::vector<char *> pointers(std::vector<std::string> *texts) {
  std::vector<char *> found;
  for (std::string &text : *texts) {
    found.push_back(&text[0]);
  }
  found.push_back(nullptr);
  return found;
}

// posix_spawn's two bags, which have to be freed.
struct SpawnSettings {
  SpawnSettings() {
    check(posix_spawn_file_actions_init(&actions));
    check(posix_spawnattr_init(&attributes));
  }
  ~SpawnSettings() {
    posix_spawn_file_actions_destroy(&actions);
    posix_spawnattr_destroy(&attributes);
  }
  SpawnSettings(const SpawnSettings &) = delete;
  SpawnSettings &operator=(const SpawnSettings &) = delete;

  static void check(int code) {
    if (code != 0) {
      throw system_failure("a server cannot be prepared", code);
    }
  }

  posix_spawn_file_actions_t actions;
  posix_spawnattr_t attributes;
};

}  // namespace

ServerProcess::ServerProcess(const Launch &launch) : log_(launch.log), log_user_(launch.log_user) {
  int ends[2];
  if (pipe2(ends, O_CLOEXEC) < 0) {
    throw system_failure("no pipe can be made", errno);
  }
  output_ = Descriptor(ends[0]);
  const Descriptor input(ends[1]);
  folder_ = make_folder();
  socket_path_ = folder_ + kSocketName;
  try {
    start(launch, input.get());
  } catch (...) {
    remove_folder();
    throw;
  }
  try {
    // Signals are for the caller's threads.
    sigset_t all;
    sigset_t before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    reader_ = std::thread([this] { read_log(); });
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
  } catch (const std::exception &) {
    signal(SIGKILL);
    waitpid(id_, nullptr, 0);
    remove_folder();
    throw Failure(SDRT_SYSTEM, "no thread can be started");
  }
}

void ServerProcess::start(const Launch &launch, int output) {
  std::vector<std::string> words = {launch.program, "serve", "--bundle", launch.bundle, "--uds", socket_path_};
  words.insert(words.end(), {"--parent", std::to_string(getpid()), "--allow-shared-memory"});
  words.insert(words.end(), launch.arguments.begin(), launch.arguments.end());
  std::vector<std::string> entries = environment(launch.key);

  SpawnSettings settings;
  posix_spawn_file_actions_t *const actions = &settings.actions;
  // The pipe first: where the caller has closed its standard streams it may be 0 or 1.
  SpawnSettings::check(posix_spawn_file_actions_adddup2(actions, output, 2));
  SpawnSettings::check(posix_spawn_file_actions_addopen(actions, 0, "/dev/null", O_RDONLY, 0));
  SpawnSettings::check(posix_spawn_file_actions_addopen(actions, 1, "/dev/null", O_WRONLY, 0));
  SpawnSettings::check(posix_spawn_file_actions_addclosefrom_np(actions, 3));
  sigset_t signals;
  sigemptyset(&signals);
  SpawnSettings::check(posix_spawnattr_setsigmask(&settings.attributes, &signals));
  sigfillset(&signals);
  SpawnSettings::check(posix_spawnattr_setsigdefault(&settings.attributes, &signals));
  // Ctrl-C in a terminal is for the caller, who decides when the server ends.
  SpawnSettings::check(posix_spawnattr_setpgroup(&settings.attributes, 0));
  SpawnSettings::check(posix_spawnattr_setflags(
      &settings.attributes, POSIX_SPAWN_SETSIGMASK | POSIX_SPAWN_SETSIGDEF | POSIX_SPAWN_SETPGROUP));
  const int code = posix_spawnp(&id_, launch.program.c_str(), actions, &settings.attributes, pointers(&words).data(),
                                pointers(&entries).data());
  if (code != 0) {
    throw system_failure("\"" + launch.program + "\" cannot be started", code, SDRT_START_FAILED);
  }
}

ServerProcess::~ServerProcess() {
  if (getpid() != owner_) {
    // A fork of the owner: the child is not its own, and a thread that is not there cannot be joined nor let go of.
    new std::thread(std::move(reader_));
    return;
  }
  signal(SIGTERM);
  if (!has_ended(kPatienceMs)) {
    signal(SIGKILL);
    has_ended(kPatienceMs);
  }
  // It may have children of its own that keep the pipe open.
  stop_reading_.fire();
  reader_.join();
  remove_folder();
}

void ServerProcess::signal(int number) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (!reap()) {
    kill(id_, number);
  }
}

// Called with the lock held. Until it is waited for, its number is nobody else's.
bool ServerProcess::reap() {
  if (ended_) {
    return true;
  }
  siginfo_t facts = {};
  int code = 0;
  do {
    code = waitid(P_PID, static_cast<id_t>(id_), &facts, WEXITED | WNOHANG);
  } while (code < 0 && errno == EINTR);
  if (code < 0) {
    // The caller ignores SIGCHLD, or waits for all children there are.
    ended_ = true;
    how_ = "it has ended";
  } else if (facts.si_pid != 0) {
    ended_ = true;
    exited_ = facts.si_code == CLD_EXITED;
    const char *const meaning = exited_ ? nullptr : sigdescr_np(facts.si_status);
    how_ = (exited_ ? "it has ended with exit code " : "it was ended by signal ") + std::to_string(facts.si_status);
    how_ += meaning == nullptr ? "" : std::string(" (") + meaning + ")";
  }
  return ended_;
}

bool ServerProcess::has_ended(std::uint32_t wait_ms) {
  const auto until = Clock::now() + std::chrono::milliseconds(wait_ms);
  std::unique_lock<std::mutex> lock(mutex_);
  while (!reap()) {
    if (Clock::now() >= until) {
      return false;
    }
    changed_.wait_for(lock, kLook);
  }
  changed_.wait_for(lock, std::chrono::milliseconds(kLastWordsMs), [this] { return log_ended_; });
  return true;
}

std::string ServerProcess::obituary() {
  const std::lock_guard<std::mutex> lock(mutex_);
  return exited_ && !last_line_.empty() ? how_ + ": " + last_line_ : how_;
}

void ServerProcess::read_log() {
  pthread_setname_np(pthread_self(), "sdrt-log");
  std::array<pollfd, 2> watched = {{{output_.get(), POLLIN, 0}, {stop_reading_.descriptor(), POLLIN, 0}}};
  std::array<char, 4096> part;
  std::string line;
  while (true) {
    if (poll(watched.data(), watched.size(), -1) < 0) {
      break;  // which EINTR is not: this thread takes no signals
    }
    if (watched[0].revents == 0) {
      break;
    }
    const ssize_t count = read(output_.get(), part.data(), part.size());
    if (count <= 0) {
      break;
    }
    for (const char *at = part.data(); at != part.data() + count; ++at) {
      if (*at == '\n') {
        take_line(line);
        line.clear();
      } else if (line.size() < kLongestLine) {
        line.push_back(*at);
      }
    }
  }
  if (!line.empty()) {
    take_line(line);
  }
  const std::lock_guard<std::mutex> lock(mutex_);
  log_ended_ = true;
  changed_.notify_all();
}

void ServerProcess::take_line(const std::string &line) {
  static constexpr char kPrefix[] = "sdrt: ";
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    const bool own = line.compare(0, sizeof kPrefix - 1, kPrefix) == 0;
    last_line_ = own ? line.substr(sizeof kPrefix - 1) : line;
  }
  if (log_ != nullptr) {
    log_(line.c_str(), log_user_);
  }
}

void ServerProcess::remove_folder() const {
  unlink(socket_path_.c_str());
  rmdir(folder_.c_str());
}

}  // namespace sdrt_internal
