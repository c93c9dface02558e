# frozen_string_literal: true

require_relative "helper"

class LockTest < EtcdlockTest
  on_each "a lock is held until it is unlocked and tokens rise" do |target|
    connect(target, ttl: 10, owner: "me") do |session|
      mutex = session.mutex(name = fresh_name)
      hold = mutex.lock
      assert hold.held? && mutex.held? && mutex.locked?
      hold.check
      assert_equal [hold.token, name, name], [mutex.token, mutex.name, hold.name]
      assert_includes 1.0..10.0, hold.remaining
      assert_nil session.mutex(name).try_lock
      holder = session.contenders(name).first
      assert_equal [true, "me", "ruby", Process.pid, hold.token],
                   [holder.holder?, holder.owner, holder.language, holder.pid, holder.token]
      hold.unlock
      refute hold.held? || mutex.held?
      assert hold.released?
      assert_nil mutex.token
      assert_equal 0.0, hold.remaining
      [-> { hold.unlock }, -> { mutex.unlock }, -> { hold.check }].each { |call| assert_raises(Etcdlock::NotHeld, &call) }
      second = mutex.try_lock
      assert_operator second.token, :>, hold.token
      mutex.unlock
      assert_equal 2, session.stats.locks
      assert_equal 10.0, session.ttl
      nothing_is_left(session, name)
    end
  end

  on_each "row 54: locks are neither dumped nor copied" do |target|
    connect(target) do |session|
      mutex = session.mutex(fresh_name)
      hold = mutex.lock
      [session, mutex, hold].each do |object|
        [-> { Marshal.dump(object) }, -> { object.dup }, -> { object.clone }].each { |call| assert_raises(TypeError, &call) }
      end
      assert hold.held?
      hold.unlock
    end
  end

  on_each "synchronize unlocks however the block ends" do |target|
    connect(target) do |session|
      mutex = session.mutex(fresh_name)
      assert_equal 7, (mutex.synchronize { |hold| hold.held? && 7 })
      assert_raises(ZeroDivisionError) { mutex.synchronize { 1 / 0 } }
      assert_equal 8, (mutex.synchronize { break 8 })
      catch(:out) { mutex.synchronize { throw :out } }
      mutex.synchronize(&:unlock)
      mutex.try_lock.unlock
      nothing_is_left(session, mutex.name)
    end
  end

  on_each "a timeout leaves nothing" do |target|
    connect(target) do |session|
      hold = session.mutex(name = fresh_name).lock
      connect(target) do |other|
        mutex = other.mutex(name)
        [0.05, 0].each { |limit| assert_raises(Etcdlock::LockTimeout) { mutex.lock(timeout: limit) } }
        assert_raises(Etcdlock::LockTimeout) { mutex.synchronize(timeout: 0.01) { flunk } }
      end
      hold.unlock
      nothing_is_left(session, name)
    end
  end

  on_each "other threads run while one waits" do |target|
    connect(target) do |session|
      hold = session.mutex(name = fresh_name).lock
      waiter = thread { session.mutex(name).lock.unlock }
      until_waiting(waiter)
      assert_equal 1000, 1000.times.count { Thread.pass || waiter.alive? }
      hold.unlock
      waiter.join
    end
  end

  # The least that Ruby's scheduler interface asks for.
  class Scheduler
    def initialize = @waiting = {}

    def fiber(&work) = Fiber.new(blocking: false, &work).tap(&:resume)

    def io_wait(io, events, _timeout)
      @waiting[io] = Fiber.current
      Fiber.yield
      events
    end

    def close
      IO.select(@waiting.keys).first.each { |io| @waiting.delete(io).resume } until @waiting.empty?
    end

    def block(*) = raise("a fiber blocks its thread")
    alias kernel_sleep block
    alias unblock block
  end

  on_each "other fibers run while one waits" do |target|
    connect(target) do |session|
      first = session.mutex(name = fresh_name).lock
      seen = []
      Thread.new do
        Fiber.set_scheduler(Scheduler.new)
        5.times { |n| Fiber.schedule { session.mutex(name).synchronize { seen << n } } }
        Fiber.schedule { seen << :other }
        Fiber.schedule { session.contenders(name) && first.unlock }
      end.join
      assert_equal [:other, 0, 1, 2, 3, 4], seen
      nothing_is_left(session, name)
    end
  end

  on_each "kill and raise and Timeout end the wait and leave nothing" do |target|
    connect(target) do |session|
      hold = session.mutex(name = fresh_name).lock
      [->(t) { t.kill }, ->(t) { t.raise("mine") }].each do |stop|
        waiter = thread { session.mutex(name).lock }
        until_waiting(waiter)
        stop.call(waiter)
        begin
          waiter.join
        rescue RuntimeError => e
          assert_equal "mine", e.message
        end
      end
      assert_raises(Timeout::Error) { Timeout.timeout(0.05) { session.mutex(name).lock } }
      assert_raises(Timeout::Error) { Timeout.timeout(0.05) { session.mutex(name).synchronize { flunk } } }
      hold.unlock
      nothing_is_left(session, name)
    end
  end

  on_each "an exception at the moment of the grant leaves nothing" do |target|
    connect(target) do |session|
      name = fresh_name
      stopped = 0
      longest = target == ETCD ? 0.004 : 0.0004
      300.times do |n|
        first = session.mutex(name).lock
        waiter = thread do
          # An interrupt may come anywhere, or only where it waits.
          next session.mutex(name).synchronize { Thread.pass || true } if n.even?

          Thread.handle_interrupt(Object => :on_blocking) { session.mutex(name).lock.unlock || true }
        end
        until_waiting(waiter)
        release = thread { first.unlock }
        sleep rand * longest
        n % 3 == 0 ? waiter.kill : waiter.raise("stop")
        begin
          stopped += 1 unless waiter.value
        rescue RuntimeError
          stopped += 1
        end
        release.join
        # Whatever the waiter had got is free again, and no warning says that it was garbage.
        session.mutex(name).lock(timeout: 60).unlock
      end
      assert_operator stopped, :>, 0
      nothing_is_left(session, name)
    end
  end

  on_each "threads exclude each other through one mutex and through many" do |target|
    connect(target) do |session|
      shared = session.mutex(name = fresh_name)
      inside = 0
      tokens = []
      threads = Array.new(8) do |n|
        mutex = n.even? ? shared : session.mutex(name)
        thread do
          (target == ETCD ? 30 : 200).times do
            mutex.synchronize do |hold|
              assert_equal 1, inside += 1
              Thread.pass
              tokens << hold.token
              inside -= 1
            end
          end
        end
      end
      threads.each(&:join)
      assert_equal tokens.sort, tokens
      assert_equal tokens.uniq, tokens
      nothing_is_left(session, name)
    end
  end

  on_each "guarded writes are applied only while the lock is held" do |target|
    connect(target) do |session|
      hold = session.mutex(name = fresh_name).lock
      key = "#{name}.state"
      assert_nil hold.get(key)
      hold.put(key, "paid")
      assert_equal "paid", hold.get(key)
      bytes = [0, 255, 127].pack("C*")
      hold.put(key, bytes)
      assert_equal bytes, hold.get(key)
      hold.delete(key)
      assert_nil hold.get(key)
      hold.unlock
      assert_raises(Etcdlock::NotHeld) { hold.put(key, "late") }
    end
  end

  once "a loss is heard of once by each block and the guarded write is refused" do
    connect do |session|
      hold = session.mutex(name = fresh_name).lock
      heard = Thread::Queue.new
      hold.on_lost { |error| heard << [1, error.class] }
      # It may block, and even lock.
      hold.on_lost { session.mutex("#{name}.other").synchronize { |other| heard << [2, other.held?] } }
      delete_keys(name)
      assert_equal [[1, Etcdlock::LockLost], [2, true]], [heard.pop, heard.pop]
      refute hold.held?
      assert_equal "its key was deleted from outside", hold.loss
      assert_raises(Etcdlock::LockLost) { hold.check }
      assert_raises(Etcdlock::LockLost) { hold.put("#{name}.state", "late") }
      hold.on_lost { |error| heard << [3, error.message.include?("deleted")] }
      assert_equal [3, true], heard.pop
      assert_includes assert_raises(Etcdlock::LockLost) { hold.unlock }.message, name
      assert_empty heard
    end
  end

  once "a block of a released hold hears nothing and the session outlives its lease" do
    connect do |session|
      heard = Thread::Queue.new
      released = session.mutex(fresh_name).lock
      released.on_lost { heard << :released }
      released.unlock
      held = session.mutex(fresh_name).lock
      held.on_lost { heard << :held }
      revoke(session.lease_id)
      assert_equal :held, heard.pop
      assert_empty heard
      assert_raises(Etcdlock::LockLost) { held.unlock }
      session.mutex(held.name).lock.unlock
      assert_equal 1, session.stats.leases_lost
    end
  end

  once "leaving synchronize after a loss raises unless the block does" do
    connect do |session|
      lose = ->(hold) { delete_keys(hold.name) && eventually { !hold.held? } }
      assert_raises(Etcdlock::LockLost) { session.mutex(fresh_name).synchronize(&lose) }
      assert_raises(ZeroDivisionError) { session.mutex(fresh_name).synchronize { |hold| lose.call(hold) && 1 / 0 } }
    end
  end

  on_each "closing a session releases its holds and ends its waits" do |target|
    name = fresh_name
    connect(target) do |watching|
      session = connect(target)
      hold = session.mutex(name).lock
      waiter = thread { session.mutex(name).lock }
      until_waiting(waiter)
      session.close
      session.close(timeout: 1)
      assert_raises(Etcdlock::Closed) { waiter.join }
      refute hold.held?
      assert_raises(Etcdlock::LockLost) { hold.unlock }
      assert_raises(Etcdlock::Closed) { session.mutex(name) }
      nothing_is_left(watching, name)
    end
  end

  once "wrong arguments are named at once" do
    assert_includes assert_raises(Etcdlock::Invalid) { connect("redis://a") }.message, "redis"
    assert_raises(Etcdlock::Invalid) { connect([]) }
    assert_raises(Etcdlock::Invalid) { connect("memory:", ttl: 1) }
    assert_raises(Etcdlock::Invalid) { connect("memory:", ttl: "10") }
    assert_raises(Etcdlock::Invalid) { connect("memory:", owner: 5) }
    [["hunter2"], :hunter2, { is: "hunter2" }, "hunter2\xff"].each do |secret|
      error = assert_raises(Etcdlock::Invalid) { connect("memory:", user: "root", password: secret) }
      refute_includes error.full_message, "hunter2"
    end
    assert_raises(Etcdlock::Invalid) { connect("memory:", connect_timeout: -1) }
    connect("memory:") do |session|
      assert_equal "the lock name nil is not a String", assert_raises(Etcdlock::Invalid) { session.mutex(nil) }.message
      assert_includes assert_raises(Etcdlock::Invalid) { session.mutex("\xff") }.message, 'the lock name "\xFF" is not valid UTF-8'
      session.mutex("a").synchronize do |hold|
        assert_equal "the value 5 is not a String", assert_raises(Etcdlock::Invalid) { hold.put("k", 5) }.message
      end
      ["", "a\0", "x" * 1025, "\xff", nil, 5].each { |name| assert_raises(Etcdlock::Invalid) { session.mutex(name) } }
      [-1, Float::NAN, "5", []].each { |limit| assert_raises(Etcdlock::Invalid) { session.mutex("a").lock(timeout: limit) } }
      session.mutex("a").synchronize(timeout: Float::INFINITY) { |hold| assert_raises(Etcdlock::Invalid) { hold.put("k", nil) } }
    end
  end

  once "a target that is not there is unavailable with its name" do
    error = assert_raises(Etcdlock::Unavailable) { connect("127.0.0.1:1", connect_timeout: 0.2) }
    assert_includes error.message, "127.0.0.1:1"
    assert_equal "UNAVAILABLE", error.kind
    assert_nil error.cause
  end

  once "namespaces and max_hold are passed on" do
    connect("memory:options", namespace: "/ns", max_hold: 0.1) do |session|
      hold = session.mutex("/a").lock
      assert_equal "/ns/a", hold.name
      eventually { !hold.held? }
      assert_equal "it was kept longer than max_hold", hold.loss
    end
  end

  once "every kind of error has its exception" do
    kinds = ObjectSpace.each_object(Etcdlock::Error.singleton_class).filter_map { |error| error.kind if error != Etcdlock::Error }
    assert_equal EtcdlockNative.error_kinds.sort, kinds.sort
  end

  once "the version is the crates" do
    assert_equal ENV.fetch("ETCDLOCK_VERSION"), Etcdlock::VERSION
  end

  once "waits and interrupts leave no descriptor and no thread" do
    descriptors = -> { Dir.children("/proc/self/fd").size }
    connect do |session|
      work = proc do
        hold = session.mutex(name = fresh_name).lock
        waiters = Array.new(5) { thread { session.mutex(name).lock } }
        waiters.each { |waiter| until_waiting(waiter) }
        waiters.each(&:kill).each(&:join)
        hold.unlock
      end
      work.call
      before = [descriptors.call, Thread.list.size]
      20.times(&work)
      assert_operator descriptors.call, :<=, before[0] + 4
      assert_equal before[1], Thread.list.size
    end
  end
end
