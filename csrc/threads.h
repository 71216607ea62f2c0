// Threads that help the one that calls: each takes the next part of its work for as long as there is one.
#pragma once

#include <pthread.h>

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <queue>
#include <thread>
#include <utility>

namespace ccl_fast {

class Helpers {
 public:
  // Calls work(0) ... work(parts - 1) from up to `threads` threads, the calling one among them, and throws the first of
  // what they throw, when all have ended. A helper that comes late, as where other programs have the cores, is not waited
  // for, and finds nothing left to do.
  static void share(int64_t parts, int64_t threads, std::function<void(int64_t)> work) {
    const auto job = std::make_shared<Job>(parts, std::move(work));
    const int64_t helpers = (parts < threads ? parts : threads) - 1;
    if (helpers > 0) of_process().announce(job, helpers);
    job->help();
    job->wait();
  }

 private:
  class Job {
   public:
    Job(int64_t parts, std::function<void(int64_t)> work) : parts_(parts), work_(std::move(work)) {}

    void help() {
      int64_t own = 0;
      for (int64_t i; (i = next_++) < parts_; ++own) {
        try {
          work_(i);
        } catch (...) {
          const std::lock_guard<std::mutex> lock(mutex_);
          if (!error_) error_ = std::current_exception();
        }
      }
      const std::lock_guard<std::mutex> lock(mutex_);
      done_ += own;
      if (own > 0 && done_ == parts_) finished_.notify_one();
    }

    void wait() {
      std::unique_lock<std::mutex> lock(mutex_);
      finished_.wait(lock, [this] { return done_ == parts_; });
      if (error_) std::rethrow_exception(error_);
    }

   private:
    const int64_t parts_;
    const std::function<void(int64_t)> work_;
    std::atomic<int64_t> next_{0};
    int64_t done_ = 0;
    std::exception_ptr error_;
    std::mutex mutex_;
    std::condition_variable finished_;
  };

  // Those of this process: a forked one has none of the threads. They sleep in it until the process ends.
  static Helpers& of_process() {
    static Helpers* helpers = new Helpers;
    static const int registered = pthread_atfork(nullptr, nullptr, [] { helpers = new Helpers; });
    (void)registered;
    return *helpers;
  }

  void announce(const std::shared_ptr<Job>& job, int64_t helpers) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      try {
        for (; threads_ < helpers; ++threads_) std::thread([this] { serve(); }).detach();
      } catch (const std::exception&) {  // there may be no more of them: the work is done by fewer
      }
      try {
        for (int64_t i = 0; i < helpers && i < threads_; ++i) jobs_.push(job);
      } catch (const std::exception&) {  // no memory to tell them
      }
    }
    for (int64_t i = 0; i < helpers; ++i) arrived_.notify_one();
  }

  void serve() {
    for (;;) {
      std::unique_lock<std::mutex> lock(mutex_);
      arrived_.wait(lock, [this] { return !jobs_.empty(); });
      const std::shared_ptr<Job> job = std::move(jobs_.front());
      jobs_.pop();
      lock.unlock();
      job->help();
    }
  }

  std::mutex mutex_;
  std::condition_variable arrived_;
  std::queue<std::shared_ptr<Job>> jobs_;
  int64_t threads_ = 0;
};

}  // namespace ccl_fast
