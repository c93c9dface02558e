# frozen_string_literal: true

module Etcdlock
  # What belongs to this process: its bells, its thread for events, and its end. A forked child gets its own.
  module This
    extend self

    # How long the end of the process waits for its sessions to be closed in etcd.
    EXIT_LIMIT = 1.0

    STARTING = Thread::Mutex.new
    LEVELS = { 1 => :error, 2 => :warn, 3 => :info, 4 => :debug, 5 => :debug }.freeze

    @pid = nil
    @exiting = nil

    # Bells that are free. Those of the parent are no good in a forked child: it would ring there.
    def bells
      @bells, @bells_pid = [], ::Process.pid unless @bells_pid == ::Process.pid
      @bells
    end

    # Once in each process, before its first session.
    def begin
      return if @pid == ::Process.pid

      STARTING.synchronize do
        return if @pid == ::Process.pid

        @watched = ObjectSpace::WeakMap.new
        @number = 0
        inbox = EtcdlockNative.open_inbox
        EtcdlockNative.set_log_level(Etcdlock.logger&.debug? ? 4 : 3)
        at_exit { finish } unless @pid
        @pid = ::Process.pid
        @thread = Thread.new { hand_on(inbox) }
        @thread.name = "etcdlock-events"
      end
    end

    # Has the hold hear of its loss. It can still become garbage.
    def watch(hold)
      number = STARTING.synchronize { @number += 1 }
      @watched[number] = hold
      number
    end

    # The end of the process closes the sessions beneath the other threads, which must not print traces about it.
    def stay_quiet_at_exit
      sleep if @exiting && @exiting != Thread.current
    end

    private

    def finish
      return unless @pid == ::Process.pid

      @exiting = Thread.current
      EtcdlockNative.set_log_level(0)
      EtcdlockNative.shutdown(EXIT_LIMIT)
    end

    def hand_on(inbox)
      io = IO.for_fd(inbox.descriptor, autoclose: false)
      loop do
        io.wait_readable
        EtcdlockNative.take_events.each do |event|
          event.lost? ? @watched[event.id]&.send(:hear_of_loss, event.text) : log(event)
        rescue StandardError => e
          Kernel.warn "etcdlock: in a callback: #{e.full_message(highlight: false)}"
        end
      end
    end

    def log(line)
      if Etcdlock.logger
        Etcdlock.logger.public_send(LEVELS.fetch(line.level, :debug), "etcdlock") { line.text }
      elsif line.target == "etcdlock::forgotten"
        Kernel.warn "etcdlock: #{line.text}"
      end
    end
  end
  private_constant :This
end
