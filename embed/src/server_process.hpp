// A server of the library's own: `sdrt serve` on a Unix socket in a folder of its own.
#ifndef SDRT_SRC_SERVER_PROCESS_HPP
#define SDRT_SRC_SERVER_PROCESS_HPP

#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <string>
#include <sys/types.h>
#include <thread>
#include <unistd.h>
#include <vector>

#include "descriptor.hpp"
#include "sdrt.h"

namespace sdrt_internal {

// How to start one.
struct Launch {
  std::string program;
  std::string bundle;
  std::vector<std::string> arguments;
  std::string key;  // empty: that of the environment
  sdrt_log_fn log = nullptr;
  void *log_user = nullptr;
};

class ServerProcess {
 public:
  // Throws Failure.
  explicit ServerProcess(const Launch &launch);
  // Ends it: SIGTERM, and SIGKILL after a while.
  ~ServerProcess();
  ServerProcess(const ServerProcess &) = delete;
  ServerProcess &operator=(const ServerProcess &) = delete;

  const std::string &socket_path() const { return socket_path_; }
  pid_t id() const { return id_; }

  // Tells whether it has ended, and if so waits for its last words. Waits for the end itself up to so long.
  bool has_ended(std::uint32_t wait_ms);
  // How it ended, and the last line that it wrote unless a signal ended it; only once it has.
  std::string obituary();

 private:
  void start(const Launch &launch, int output);
  bool reap();
  void read_log();
  void take_line(const std::string &line);
  void signal(int number);
  void remove_folder() const;

  const pid_t owner_ = getpid();
  std::string folder_;
  std::string socket_path_;
  sdrt_log_fn log_;
  void *log_user_;

  std::mutex mutex_;
  std::condition_variable changed_;
  pid_t id_ = 0;
  bool ended_ = false;
  bool exited_ = false;  // by itself
  std::string how_;
  std::string last_line_;
  bool log_ended_ = false;

  Descriptor output_;
  Event stop_reading_;
  std::thread reader_;
};

}  // namespace sdrt_internal

#endif
