// File descriptors that close themselves.
#ifndef SDRT_SRC_DESCRIPTOR_HPP
#define SDRT_SRC_DESCRIPTOR_HPP

#include <cstdint>
#include <utility>

namespace sdrt_internal {

class Descriptor {
 public:
  Descriptor() = default;
  explicit Descriptor(int number) : number_(number) {}
  Descriptor(Descriptor &&other) noexcept : number_(std::exchange(other.number_, -1)) {}
  Descriptor &operator=(Descriptor &&other) noexcept {
    std::swap(number_, other.number_);
    return *this;
  }
  Descriptor(const Descriptor &) = delete;
  Descriptor &operator=(const Descriptor &) = delete;
  ~Descriptor() { reset(); }

  int get() const { return number_; }
  void reset() noexcept;

 private:
  int number_ = -1;
};

// Something that is fired once and then stays fired, and that poll can wait for.
class Event {
 public:
  Event();
  void fire() const noexcept;  // also in signal handlers
  int descriptor() const { return descriptor_.get(); }

 private:
  Descriptor descriptor_;
};

}  // namespace sdrt_internal

#endif
