// The behaviour of etcdlock.hpp: cpp TARGET.
#include <etcdlock.hpp>

#include <atomic>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <future>
#include <iostream>
#include <mutex>
#include <thread>
#include <type_traits>
#include <unistd.h>

#define CHECK(...)                                                                                                    \
    do {                                                                                                              \
        if (!(__VA_ARGS__)) {                                                                                         \
            std::fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #__VA_ARGS__);                            \
            std::_Exit(1);                                                                                            \
        }                                                                                                             \
    } while (0)

using namespace std::chrono_literals;
using etcdlock::status;

static std::string target;

static std::string fresh_name() {
    static int n = 0;
    return "/cpp-test/" + std::to_string(getpid()) + "/" + std::to_string(n++);
}

template <class Call> status status_of(Call call) {
    try {
        call();
        return status::ok;
    } catch (const etcdlock::error &error) {
        CHECK(std::strlen(error.what()) > 0);
        return error.code();
    }
}

static void the_guards_of_the_standard_library_work() {
    etcdlock::session session(target);
    const auto name = fresh_name();
    etcdlock::mutex mutex(session, name), same(session, name), other(session, fresh_name());
    {
        std::lock_guard<etcdlock::mutex> guard(mutex);
        CHECK(mutex.is_held() && mutex.token() > 0 && mutex.remaining() > 1s);
        std::unique_lock<etcdlock::mutex> tried(same, std::try_to_lock);
        CHECK(!tried.owns_lock());
        CHECK(!same.try_lock_for(20ms) && !same.try_lock_until(std::chrono::system_clock::now() + 20ms));
        std::unique_lock timed(same, 20ms);
        CHECK(!timed);
    }
    CHECK(!mutex.is_held());
    {
        std::scoped_lock both(mutex, other);
        CHECK(mutex.is_held() && other.is_held());
    }
    {
        std::unique_lock lock(same, 20s);
        CHECK(lock && same.is_held());
        lock.unlock();
        lock.lock();
    }
    CHECK(std::try_lock(mutex, other) == -1);
    mutex.release();
    other.release();
    session.close();
}

static void a_condition_variable_waits_with_it() {
    etcdlock::session session(target);
    etcdlock::mutex mutex(session, fresh_name());
    std::condition_variable_any changed;
    bool ready = false;
    std::thread teller([&] {
        std::lock_guard guard(mutex);
        ready = true;
        changed.notify_all();
    });
    std::unique_lock lock(mutex);
    CHECK(changed.wait_for(lock, 60s, [&] { return ready; }));
    CHECK(mutex.is_held());
    lock.unlock();
    teller.join();
}

static void threads_exclude_each_other_also_by_deadlock_free_pairs() {
    etcdlock::session session(target);
    etcdlock::mutex a(session, fresh_name()), b(session, fresh_name());
    int count = 0;
    std::vector<std::thread> threads;
    for (int n = 0; n < 4; n++)
        threads.emplace_back([&, n] {
            for (int round = 0; round < 25; round++) {
                if (n % 2 == 0) {
                    std::scoped_lock both(a, b);
                    count++;
                } else {
                    std::lock_guard one(a);
                    count++;
                }
            }
        });
    for (auto &thread : threads)
        thread.join();
    CHECK(count == 100);
}

static void failures_are_thrown_with_status_and_message() {
    CHECK(status_of([] { etcdlock::session("redis://x"); }) == status::invalid);
    CHECK(status_of([] { etcdlock::session(target, etcdlock::options().ttl(1s)); }) == status::invalid);
    CHECK(status_of([] { etcdlock::options().ttl(-1s); }) == status::invalid);
    CHECK(status_of([] { etcdlock::session("127.0.0.1:1", etcdlock::options().connect_timeout(50ms)); }) == status::unavailable);
    etcdlock::session session(target, etcdlock::options().ttl(9s).owner("me").name_prefix("/in").connect_timeout(20s));
    CHECK(session.ttl() == 9s);
    CHECK(status_of([&] { etcdlock::mutex(session, ""); }) == status::invalid);
    etcdlock::mutex mutex(session, fresh_name());
    CHECK(status_of([&] { mutex.release(); }) == status::not_held);
    CHECK(status_of([&] { mutex.check(); }) == status::not_held);
    CHECK(status_of([&] { mutex.put("k", "v"); }) == status::not_held);
    CHECK(status_of([&] { mutex.on_lost([](etcdlock::loss) {}); }) == status::not_held);
    mutex.unlock(); // does not throw
    etcdlock::mutex moved(std::move(mutex));
    CHECK(status_of([&] { mutex.lock(); }) == status::invalid);
    moved.lock();
    moved.check();
    const auto queue = session.inspect(fresh_name());
    CHECK(queue.empty());
    CHECK(session.stats().locks == 1);
    session.close();
    CHECK(status_of([&] { moved.lock(); }) == status::closed);
}

static void guarded_values_and_inspect_are_strings() {
    etcdlock::session session(target, etcdlock::options().owner("me"));
    const auto name = fresh_name(), key = name + "-state";
    etcdlock::mutex mutex(session, name);
    std::lock_guard guard(mutex);
    CHECK(!mutex.get(key));
    mutex.put(key, std::string(1000, 'x'));
    CHECK(mutex.get(key) == std::string(1000, 'x'));
    mutex.put(key, "");
    CHECK(mutex.get(key) == "");
    mutex.erase(key);
    CHECK(!mutex.get(key));
    const auto queue = session.inspect(name);
    CHECK(queue.size() == 1 && queue[0].is_holder && queue[0].owner == "me" && queue[0].language == "c");
    CHECK(queue[0].token == mutex.token() && queue[0].age && queue[0].pid == static_cast<std::uint32_t>(getpid()));
}

static void a_loss_reaches_the_latest_listener_of_a_mutex_that_is_there() {
    etcdlock::session session(target);
    etcdlock::mutex mutex(session, fresh_name());
    std::promise<etcdlock::loss> told;
    std::atomic<int> others{0};
    mutex.lock();
    mutex.on_lost([&](etcdlock::loss) { others++; });
    mutex.on_lost([&](etcdlock::loss why) {
        told.set_value(why);
        throw 1; // ends here
    });
    {
        etcdlock::mutex gone(session, fresh_name());
        gone.lock();
        gone.on_lost([&](etcdlock::loss) { others++; });
    }
    session.close();
    CHECK(told.get_future().get() == etcdlock::loss::closed && mutex.why_lost() == etcdlock::loss::closed);
    CHECK(status_of([&] { mutex.check(); }) == status::lost);
    CHECK(status_of([&] { mutex.release(); }) == status::lost);
    CHECK(etcdlock_flush_callbacks(-1) == ETCDLOCK_OK);
    CHECK(others == 0);
}

static void a_started_lock_calls_a_function_object_once() {
    etcdlock::session session(target);
    const auto name = fresh_name();
    etcdlock::mutex mutex(session, name), other(session, name);
    std::promise<std::int64_t> token;
    std::promise<status> cancelled, unlocked;
    mutex.lock_start([&](status got, std::int64_t it) { token.set_value(got == status::ok ? it : -1); });
    CHECK(token.get_future().get() == mutex.token());
    auto waiting = other.lock_start([&](status got, std::int64_t) { cancelled.set_value(got); }, 60s);
    waiting.cancel();
    CHECK(cancelled.get_future().get() == status::cancelled);
    mutex.unlock_start([&](status got, std::int64_t) { unlocked.set_value(got); });
    CHECK(unlocked.get_future().get() == status::ok);
    // The function object is gone when the callback is over.
    CHECK(etcdlock_flush_callbacks(-1) == ETCDLOCK_OK);
}

int main(int argc, char **argv) {
    static_assert(!std::is_copy_constructible_v<etcdlock::mutex> && std::is_nothrow_move_constructible_v<etcdlock::mutex>);
    static_assert(noexcept(std::declval<etcdlock::mutex &>().unlock()));
    target = argc > 1 ? argv[1] : "";
    the_guards_of_the_standard_library_work();
    a_condition_variable_waits_with_it();
    threads_exclude_each_other_also_by_deadlock_free_pairs();
    failures_are_thrown_with_status_and_message();
    guarded_values_and_inspect_are_strings();
    a_loss_reaches_the_latest_listener_of_a_mutex_that_is_there();
    a_started_lock_calls_a_function_object_once();
    std::cout << "  cpp: 7 tests passed on " << (target.empty() ? "etcd" : target) << std::endl;
}
