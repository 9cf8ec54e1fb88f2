// Memory for the kernels. The standard containers will not do: the linker keeps one instruction
// set's copy of their functions for all.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>
#include <utility>

namespace fastdiff::CPU_CAPABILITY {

// A growing list of plain values.
template <class T>
class Array {
 public:
  Array() = default;
  explicit Array(int64_t capacity) { reserve(capacity); }
  Array(Array&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)),
        size_(std::exchange(other.size_, 0)),
        capacity_(std::exchange(other.capacity_, 0)) {}
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;
  Array& operator=(Array&&) = delete;
  ~Array() { std::free(data_); }

  T* data() { return data_; }
  const T* data() const { return data_; }
  int64_t size() const { return size_; }
  T& operator[](int64_t i) { return data_[i]; }
  const T& operator[](int64_t i) const { return data_[i]; }

  void add(T value) {
    if (size_ == capacity_) reserve(2 * capacity_ + 16);
    data_[size_++] = value;
  }

  void clear() { size_ = 0; }

  void reserve(int64_t capacity) {
    if (capacity <= capacity_) return;
    void* grown = std::realloc(data_, capacity * sizeof(T));
    if (!grown) throw std::bad_alloc();
    data_ = static_cast<T*>(grown);
    capacity_ = capacity;
  }

 private:
  T* data_ = nullptr;
  int64_t size_ = 0, capacity_ = 0;
};

// Memory that a thread keeps from call to call, so that no call faults pages in. Each use of it is
// its own `static thread_local Scratch`. It begins at a cache line.
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { std::free(data_); }

  // Room for that many values; what was in it before is lost.
  template <class T = float>
  T* at_least(int64_t count) {
    constexpr int64_t kLineBytes = 64;
    const int64_t bytes = (count * int64_t{sizeof(T)} + kLineBytes - 1) / kLineBytes * kLineBytes;
    if (bytes > bytes_) {
      std::free(data_);
      bytes_ = 0;
      data_ = std::aligned_alloc(kLineBytes, bytes);
      if (!data_) throw std::bad_alloc();
      bytes_ = bytes;
    }
    return static_cast<T*>(data_);
  }

 private:
  void* data_ = nullptr;
  int64_t bytes_ = 0;
};

}  // namespace fastdiff::CPU_CAPABILITY
