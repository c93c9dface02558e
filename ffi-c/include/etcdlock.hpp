/*
 * libetcdlock for C++17: header only, on top of etcdlock.h.
 *
 *     etcdlock::session session("127.0.0.1:2379");
 *     etcdlock::mutex mutex(session, "/orders/42");
 *     {
 *         std::unique_lock lock(mutex, std::chrono::seconds(5));
 *         if (lock) { ... mutex.token() ... }
 *     }
 *
 * - etcdlock::mutex is BasicLockable, Lockable and TimedLockable: std::lock_guard, std::unique_lock,
 *   std::scoped_lock and std::condition_variable_any work with it.
 * - Failures are thrown as etcdlock::error, with the status and the whole message.
 * - unlock() does not throw, as the standard wants it of a mutex; release() does the same and throws.
 * - A hold can be lost. is_held(), check() and on_lost() tell; token() and put() keep the resource safe.
 * - Objects are movable, may be used by any number of threads, and free themselves.
 */
#ifndef ETCDLOCK_HPP
#define ETCDLOCK_HPP

#include "etcdlock.h"

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace etcdlock {

/// What went wrong; the numbers are those of etcdlock.h.
enum class status : std::int32_t {
    ok = ETCDLOCK_OK,
    timeout = ETCDLOCK_TIMEOUT,
    busy = ETCDLOCK_BUSY,
    lost = ETCDLOCK_LOST,
    not_held = ETCDLOCK_NOT_HELD,
    cancelled = ETCDLOCK_CANCELLED,
    unavailable = ETCDLOCK_UNAVAILABLE,
    denied = ETCDLOCK_DENIED,
    invalid = ETCDLOCK_INVALID,
    closed = ETCDLOCK_CLOSED,
    forked = ETCDLOCK_FORKED,
    deadlock = ETCDLOCK_DEADLOCK,
    internal = ETCDLOCK_INTERNAL,
};

/// Why a hold was lost.
enum class loss : std::int32_t {
    none = ETCDLOCK_LOSS_NONE,
    deadline = ETCDLOCK_LOSS_DEADLINE,
    lease_gone = ETCDLOCK_LOSS_LEASE_GONE,
    key_deleted = ETCDLOCK_LOSS_KEY_DELETED,
    refused = ETCDLOCK_LOSS_REFUSED,
    max_hold = ETCDLOCK_LOSS_MAX_HOLD,
    closed = ETCDLOCK_LOSS_CLOSED,
    forked = ETCDLOCK_LOSS_FORKED,
    internal = ETCDLOCK_LOSS_INTERNAL,
    history_changed = ETCDLOCK_LOSS_HISTORY_CHANGED,
};

/// A failure: code() for programs, what() for people.
class error : public std::runtime_error {
public:
    error(etcdlock::status code, const std::string &message) : std::runtime_error(message), code_(code) {}

    etcdlock::status code() const noexcept { return code_; }

private:
    etcdlock::status code_;
};

namespace detail {

inline void check(std::int32_t status) {
    if (status != ETCDLOCK_OK)
        throw error(static_cast<etcdlock::status>(status), etcdlock_last_error());
}

/// Milliseconds, rounded up, so that no wait is shorter than was asked for.
template <class Rep, class Period> std::int64_t milliseconds(const std::chrono::duration<Rep, Period> &time) {
    if (time <= time.zero())
        return 0;
    // Years are for ever, and more would not fit.
    if (std::chrono::duration<double>(time).count() > 1e9)
        return -1;
    return static_cast<std::int64_t>(std::chrono::ceil<std::chrono::milliseconds>(time).count());
}

/// Listeners by number. A callback that comes late finds that its number is gone, so nobody has to
/// know when the library has forgotten a listener.
class listeners {
public:
    static std::uintptr_t add(std::function<void(loss)> listener) {
        auto &all = instance();
        std::lock_guard<std::mutex> guard(all.lock_);
        all.known_.emplace(++all.last_, std::move(listener));
        return all.last_;
    }

    static void remove(std::uintptr_t number) {
        auto &all = instance();
        std::lock_guard<std::mutex> guard(all.lock_);
        all.known_.erase(number);
    }

    static void call(std::int32_t reason, void *number) noexcept {
        try {
            auto &all = instance();
            std::unique_lock<std::mutex> guard(all.lock_);
            auto found = all.known_.extract(reinterpret_cast<std::uintptr_t>(number));
            guard.unlock();
            if (!found.empty())
                found.mapped()(static_cast<loss>(reason));
        } catch (...) {
            // There is nobody to throw to on the library's thread.
        }
    }

private:
    /// Never destroyed: the library's thread may call at any time until the process is gone.
    static listeners &instance() {
        static listeners *all = new listeners;
        return *all;
    }

    std::mutex lock_;
    std::map<std::uintptr_t, std::function<void(loss)>> known_;
    std::uintptr_t last_ = 0;
};

struct free_options {
    void operator()(etcdlock_options *it) const noexcept { etcdlock_options_free(it); }
};
struct free_session {
    void operator()(etcdlock_session *it) const noexcept { etcdlock_session_free(it); }
};
struct free_mutex {
    void operator()(etcdlock_mutex *it) const noexcept { etcdlock_mutex_free(it); }
};
struct free_op {
    void operator()(etcdlock_op *it) const noexcept { etcdlock_op_free(it); }
};

} // namespace detail

/// Options of a session, each with the meaning that etcdlock.h gives. The setters throw error.
class options {
public:
    options() : it_(etcdlock_options_new()) {
        if (!it_)
            throw error(status::unavailable, etcdlock_last_error());
    }

    options &ttl(std::chrono::milliseconds time) { return set(etcdlock_options_set_ttl_ms(it_.get(), time.count())); }
    options &connect_timeout(std::chrono::milliseconds time) {
        return set(etcdlock_options_set_connect_timeout_ms(it_.get(), time.count()));
    }
    options &max_hold(std::chrono::milliseconds time) {
        return set(etcdlock_options_set_max_hold_ms(it_.get(), time.count()));
    }
    // Not `namespace`, which is a keyword.
    options &name_prefix(const std::string &prefix) { return set(etcdlock_options_set_namespace(it_.get(), prefix.c_str())); }
    options &user(const std::string &user) { return set(etcdlock_options_set_user(it_.get(), user.c_str())); }
    options &password(const std::string &password) { return set(etcdlock_options_set_password(it_.get(), password.c_str())); }
    options &ca(const std::string &pem_or_path) { return set(etcdlock_options_set_ca(it_.get(), pem_or_path.c_str())); }
    options &cert(const std::string &pem_or_path) { return set(etcdlock_options_set_cert(it_.get(), pem_or_path.c_str())); }
    options &key(const std::string &pem_or_path) { return set(etcdlock_options_set_key(it_.get(), pem_or_path.c_str())); }
    options &server_name(const std::string &name) { return set(etcdlock_options_set_server_name(it_.get(), name.c_str())); }
    options &owner(const std::string &label) { return set(etcdlock_options_set_owner(it_.get(), label.c_str())); }

    const etcdlock_options *get() const noexcept { return it_.get(); }

private:
    options &set(std::int32_t status) {
        detail::check(status);
        return *this;
    }

    std::unique_ptr<etcdlock_options, detail::free_options> it_;
};

/// One who holds a lock or waits for it.
struct contender {
    bool is_holder;
    std::string owner, host, language, key;
    std::uint32_t pid;
    std::int64_t token;
    /// Nothing if it is unknown.
    std::optional<std::chrono::milliseconds> age;
};

/// A connection with one lease, renewed until the session is closed. The destructor closes it in the
/// background; close() waits for that.
class session {
public:
    /// Connects, or throws error. An empty target: $ETCDLOCK_ENDPOINTS, else 127.0.0.1:2379.
    explicit session(const std::string &target = {}) : session(target.c_str(), nullptr) {}
    session(const std::string &target, const options &options) : session(target.c_str(), options.get()) {}

    /// Releases its holds and revokes its lease, waiting at most that long. The handle is gone afterwards
    /// even if it throws status::unavailable.
    void close(std::chrono::milliseconds timeout = std::chrono::seconds(5)) {
        const std::int32_t status = etcdlock_session_close(it_.get(), detail::milliseconds(timeout));
        if (status == ETCDLOCK_OK || status == ETCDLOCK_UNAVAILABLE)
            static_cast<void>(it_.release());
        detail::check(status);
    }

    /// Who holds the lock and who waits for it, in the order of the queue.
    std::vector<contender> inspect(const std::string &name) const {
        struct collected {
            std::vector<contender> all;
            std::exception_ptr trouble;
        } found;
        detail::check(etcdlock_session_inspect(
            it_.get(), name.c_str(),
            [](const etcdlock_contender *c, void *to) noexcept {
                auto &into = *static_cast<collected *>(to);
                try {
                    std::optional<std::chrono::milliseconds> age;
                    if (c->age_ms >= 0)
                        age = std::chrono::milliseconds(c->age_ms);
                    into.all.push_back({c->is_holder != 0, c->owner, c->host, c->language, c->key, c->pid, c->token, age});
                } catch (...) {
                    into.trouble = std::current_exception();
                }
            },
            &found));
        if (found.trouble)
            std::rethrow_exception(found.trouble);
        return std::move(found.all);
    }

    etcdlock_stats stats() const {
        etcdlock_stats stats{};
        detail::check(etcdlock_session_stats(it_.get(), &stats, sizeof stats));
        return stats;
    }

    /// The TTL that etcd granted.
    std::chrono::milliseconds ttl() const noexcept { return std::chrono::milliseconds(etcdlock_session_ttl_ms(it_.get())); }

    etcdlock_session *get() const noexcept { return it_.get(); }

private:
    session(const char *target, const etcdlock_options *options) {
        etcdlock_session *opened = nullptr;
        detail::check(etcdlock_session_open(target, options, &opened));
        it_.reset(opened);
    }

    std::unique_ptr<etcdlock_session, detail::free_session> it_;
};

/// A call that was started. Its destructor lets the call go on.
class operation {
public:
    explicit operation(etcdlock_op *op) : it_(op) {}

    /// Never blocks. The callback is still called once.
    void cancel() { detail::check(etcdlock_op_cancel(it_.get())); }

private:
    std::unique_ptr<etcdlock_op, detail::free_op> it_;
};

/// A distributed mutex of one name. Not re-entrant. It is not bound to a thread: one mutex may be shared, and
/// each lock waits its turn. The destructor releases a hold in the background.
class mutex {
public:
    mutex(const session &session, const std::string &name) {
        etcdlock_mutex *made = nullptr;
        detail::check(etcdlock_mutex_new(session.get(), name.c_str(), &made));
        it_.reset(made);
    }

    mutex(mutex &&other) noexcept : it_(std::move(other.it_)), listener_(std::exchange(other.listener_, 0)) {}
    mutex &operator=(mutex &&other) noexcept {
        forget_listener();
        it_ = std::move(other.it_);
        listener_ = std::exchange(other.listener_, 0);
        return *this;
    }
    ~mutex() { forget_listener(); }

    /// Waits its turn until the lock is held.
    void lock() { detail::check(etcdlock_mutex_lock(it_.get(), -1)); }

    /// False if somebody else holds it; throws for anything else.
    bool try_lock() { return got(etcdlock_mutex_try_lock(it_.get()), ETCDLOCK_BUSY); }

    /// False if it was not free in time, with nothing left behind.
    template <class Rep, class Period> bool try_lock_for(const std::chrono::duration<Rep, Period> &time) {
        return got(etcdlock_mutex_lock(it_.get(), detail::milliseconds(time)), ETCDLOCK_TIMEOUT);
    }

    template <class Clock, class Duration> bool try_lock_until(const std::chrono::time_point<Clock, Duration> &time) {
        return try_lock_for(time - Clock::now());
    }

    /// Releases, and waits for etcd's answer at most 5 s. It does not throw: locally the lock is released
    /// whatever happens, and what was lost is not there to be released. See release().
    void unlock() noexcept { static_cast<void>(etcdlock_mutex_unlock(it_.get())); }

    /// unlock() that throws: status::lost if the hold was lost meanwhile, status::unavailable if etcd did not
    /// answer, status::not_held.
    void release() { detail::check(etcdlock_mutex_unlock(it_.get())); }

    /// Local, some tens of nanoseconds.
    bool is_held() const noexcept { return etcdlock_mutex_is_held(it_.get()) != 0; }

    /// Throws status::lost or status::not_held, with the reason, unless is_held().
    void check() const { detail::check(etcdlock_mutex_check(it_.get())); }

    std::chrono::milliseconds remaining() const noexcept {
        return std::chrono::milliseconds(etcdlock_mutex_remaining_ms(it_.get()));
    }

    /// The fencing token; 0 if nothing is held.
    std::int64_t token() const noexcept { return etcdlock_mutex_token(it_.get()); }

    /// Why the hold was lost.
    loss why_lost() const noexcept { return static_cast<loss>(etcdlock_mutex_loss(it_.get())); }

    /// Has listener called once, on the library's thread, when the present hold is lost. A mutex has one
    /// listener: a new one takes the place of the old. It is not called after the mutex is gone.
    void on_lost(std::function<void(loss)> listener) {
        const std::uintptr_t number = detail::listeners::add(std::move(listener));
        const std::int32_t status =
            etcdlock_mutex_on_lost(it_.get(), &detail::listeners::call, reinterpret_cast<void *>(number));
        if (status != ETCDLOCK_OK)
            detail::listeners::remove(number);
        detail::check(status);
        forget_listener();
        listener_ = number;
    }

    /// Writes a key only while this mutex holds the lock, atomically in etcd; else throws status::lost.
    void put(std::string_view key, std::string_view value) {
        detail::check(etcdlock_mutex_put(it_.get(), key.data(), key.size(), value.data(), value.size()));
    }

    /// Reads a key only while this mutex holds the lock. Nothing if there is no such key.
    std::optional<std::string> get(std::string_view key) {
        std::string value(256, '\0');
        for (;;) {
            std::int64_t length = 0;
            detail::check(etcdlock_mutex_get(it_.get(), key.data(), key.size(), value.data(), value.size(), &length));
            if (length < 0)
                return std::nullopt;
            const bool fits = static_cast<std::size_t>(length) <= value.size();
            value.resize(static_cast<std::size_t>(length));
            if (fits)
                return value;
        }
    }

    /// Deletes a key only while this mutex holds the lock.
    void erase(std::string_view key) { detail::check(etcdlock_mutex_delete(it_.get(), key.data(), key.size())); }

    /// Starts a lock. done is called exactly once, on the library's thread, with the status and the token.
    /// No timeout: for ever.
    operation lock_start(std::function<void(status, std::int64_t)> done,
                         std::optional<std::chrono::milliseconds> timeout = std::nullopt) {
        return start(std::move(done), [&](etcdlock_done_fn call, void *data, etcdlock_op **op) {
            return etcdlock_mutex_lock_start(it_.get(), timeout ? detail::milliseconds(*timeout) : -1, call, data, op);
        });
    }

    /// Starts an unlock; the token given to done is 0.
    operation unlock_start(std::function<void(status, std::int64_t)> done) {
        return start(std::move(done), [&](etcdlock_done_fn call, void *data, etcdlock_op **op) {
            return etcdlock_mutex_unlock_start(it_.get(), call, data, op);
        });
    }

    etcdlock_mutex *get() const noexcept { return it_.get(); }

private:
    using done_function = std::function<void(status, std::int64_t)>;

    static bool got(std::int32_t status, std::int32_t no) {
        if (status == no)
            return false;
        detail::check(status);
        return true;
    }

    static void call_done(std::int32_t code, std::int64_t token, void *data) noexcept {
        std::unique_ptr<done_function> done(static_cast<done_function *>(data));
        try {
            (*done)(static_cast<status>(code), token);
        } catch (...) {
            // There is nobody to throw to on the library's thread.
        }
    }

    template <class Start> static operation start(done_function done, Start call) {
        auto data = std::make_unique<done_function>(std::move(done));
        etcdlock_op *op = nullptr;
        detail::check(call(&call_done, data.get(), &op));
        static_cast<void>(data.release()); // The callback frees it.
        return operation(op);
    }

    void forget_listener() noexcept {
        if (listener_ != 0)
            detail::listeners::remove(std::exchange(listener_, 0));
    }

    std::unique_ptr<etcdlock_mutex, detail::free_mutex> it_;
    std::uintptr_t listener_ = 0;
};

} // namespace etcdlock

#endif
