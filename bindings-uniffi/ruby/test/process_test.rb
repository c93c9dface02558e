# frozen_string_literal: true

require_relative "helper"

class ProcessTest < EtcdlockTest
  # Each says "ready" in its state and ends with code 3.
  STATES = {
    "holding" => "hold = mutex.lock; puts :ready; exit 3",
    "inside synchronize" => "mutex.synchronize { puts :ready; exit 3 }",
    "a thread waiting" => "hold = mutex.lock; t = Thread.new { mutex.lock }; Thread.pass until t.stop?; puts :ready; exit 3",
    "threads locking and unlocking" => <<~RUBY,
      3.times { |n| Thread.new { m = session.mutex("\#{name}/\#{n}"); loop { m.synchronize { |h| h.on_lost {} } } } }
      sleep 0.05; puts :ready; exit 3
    RUBY
    "waiting, with a trap that exits" => <<~RUBY,
      hold = mutex.lock; trap(:TERM) { exit 3 }
      Thread.new { sleep 0.05; puts :ready; Process.kill(:TERM, $$) }; mutex.lock
    RUBY
    "an exception" => "hold = mutex.lock; puts :ready; $stderr = File.open(File::NULL, 'w'); at_exit { exit 3 }; raise 'mine'",
    "its own at_exit still holding" => "hold = mutex.lock; at_exit { exit(hold.held? ? 3 : 4) }; puts :ready"
  }.freeze

  STATES.each do |state, code|
    once "row 29 the end of the process releases #{state}" do
      name = fresh_name
      assert_equal ["ready\n", "", 3], ruby(code, ETCD, name)
      eventually { keys(name).empty? }
    end
  end

  once "row 30 ctrl c interrupts a waiting lock and leaves nothing" do
    connect do |session|
      hold = session.mutex(name = fresh_name).lock
      code = "begin; puts :waiting; mutex.lock; rescue Interrupt; puts :interrupted; end"
      out, err, code = ruby(code, ETCD, name) do |_, stdout, pid|
        assert_equal "waiting\n", stdout.gets
        eventually { session.contenders(name).size == 2 }
        Process.kill(:INT, pid)
        eventually { session.contenders(name).size == 1 }
      end
      assert_equal ["interrupted\n", "", 0], [out, err, code]
      hold.unlock
    end
  end

  once "row 28 a fork leaves the lock to the parent" do
    code = <<~RUBY
      hold = mutex.lock
      hold.on_lost { abort "heard" }
      waiter = Thread.new { session.mutex(name).lock(timeout: 60).unlock }
      Thread.pass until waiter.stop?
      5.times do
        pid = fork do
          abort "held" if hold.held? || mutex.held? || hold.loss != "the process was forked"
          [-> { hold.unlock }, -> { mutex.lock }, -> { mutex.try_lock }, -> { hold.check }, -> { hold.put("k", "v") },
           -> { session.close }, -> { session.mutex("x") }, -> { session.contenders("x") }].each do |call|
            call.call
            abort "not forked"
          rescue Etcdlock::Forked
          end
          GC.start
          Etcdlock.connect(target) do |mine|
            abort "free" if mine.mutex(name).try_lock
            mine.mutex("\#{name}.child").synchronize { |other| other.put("\#{name}.said", "hello") }
          end
          exit 7 # at_exit handlers and finalizers run
        end
        abort "child" unless Process.wait2(pid).last.exitstatus == 7
      end
      hold.check
      abort "said" unless hold.get("\#{name}.said") == "hello"
      hold.unlock
      waiter.join
      puts :ok
    RUBY
    assert_equal ["ok\n", "", 0], ruby(code, ETCD, fresh_name)
  end

  once "a fork while other threads lock and unlock does no harm" do
    code = <<~RUBY
      stop = false
      threads = Array.new(3) { |n| Thread.new { m = session.mutex("\#{name}/\#{n}"); m.synchronize { |h| h.on_lost {} } until stop } }
      10.times do
        pid = fork { Etcdlock.connect(target) { |mine| mine.mutex(name).synchronize {} }; exit 7 }
        abort "child" unless Process.wait2(pid).last.exitstatus == 7
      end
      stop = true
      threads.each(&:join)
      puts :ok
    RUBY
    assert_equal ["ok\n", "", 0], ruby(code, ETCD, fresh_name)
  end

  once "row 31 a forgotten hold is released with one warning" do
    code = <<~RUBY
      def forget(session, name) = session.mutex(name).lock.on_lost { |error| raise error }
      30.times { |n| forget(session, name + n.to_s) } # some are still on the stack
      free = 0
      until free >= 25
        GC.start
        free = 30.times.count { |n| (hold = session.mutex(name + n.to_s).try_lock) && (hold.unlock || true) }
      end
      kept = session.mutex(name)
      kept.lock
      GC.start
      puts kept.held?
    RUBY
    out, err, code = ruby(code, ETCD, name = fresh_name)
    assert_equal ["true\n", 0], [out, code]
    lines = err.lines
    assert_operator lines.size, :>=, 25
    assert_equal lines.uniq, lines, "one each"
    assert lines.all? { |line| line.start_with?("etcdlock: a hold was garbage-collected") && line.include?(name) }, err
  end

  once "log lines reach the logger" do
    code = <<~RUBY
      require "logger"
      Etcdlock.logger = Logger.new($stdout, formatter: ->(level, _, program, text) { "\#{level} \#{program} \#{text}\\n" })
      hold = mutex.lock
      session.close
      $stdin.gets
    RUBY
    ruby(code, ETCD, fresh_name) do |stdin, stdout, _|
      assert_match(/\AWARN etcdlock hold lost, name=.*reason=the session was closed/, stdout.gets)
      stdin.puts
    end
  end
end
