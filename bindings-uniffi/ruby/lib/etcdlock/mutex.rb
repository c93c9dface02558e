# frozen_string_literal: true

module Etcdlock
  # One lock name, seen by one session. Not re-entrant. Share it between threads or not: each lock waits its turn.
  class Mutex
    # The name, with the session's namespace.
    attr_reader :name

    include NotCopied

    def initialize(native)
      @native = native
      @name = native.name.freeze
    end

    # Locks, gives the hold to the block, and unlocks, whatever happens. Raises LockLost if the hold was lost meanwhile,
    # unless the block raises itself. Returns what the block returns. See lock.
    def synchronize(timeout: nil)
      held = []
      release = -> { held[0].unlock if held[0] && !held[0].released? }
      Native.and_finally(release) do
        acquire(held, timeout)
        yield held[0]
      end
    end

    # Waits its turn, through outages and re-elections, until the lock is held; returns the Hold.
    #
    # timeout: seconds; nil: for ever; 0: one try. Raises LockTimeout after it, with nothing left behind. Other threads run
    # meanwhile; Thread#raise, Thread#kill, Timeout and Ctrl-C end the wait, with nothing left behind. (What comes after the
    # hold has been returned and before you have stored it is yours to care for: synchronize does.) Raises also Denied,
    # Closed, Forked, and Unavailable if etcd refuses for a reason that waiting does not mend.
    def lock(timeout: nil)
      keep { |held| acquire(held, timeout) }
    end

    # Takes the lock if it is free; nil if somebody holds it. Never waits for other holders; a failed try writes nothing.
    # Raises Unavailable without an answer within 5 s.
    def try_lock
      keep { |held| take(held) { @native.try_lock } }
    end

    # Releases the hold that was acquired last through this mutex. Blocks until etcd has confirmed it, at most 5 s. Raises
    # NotHeld, LockLost if the hold was lost before, or Unavailable: released here, and the key goes on being deleted.
    def unlock
      hold = @latest
      return hold.unlock if hold && !hold.released?

      Native.wait { @native.unlock }
      nil
    end

    # Whether this mutex holds the lock, as far as can be known here. Local and quick; false from the deadline on.
    def held? = @latest ? @latest.held? : false

    # As Thread::Mutex#locked?, of this mutex alone: see held?.
    alias locked? held?

    # Seconds for which its hold is good without another renewal; 0.0 if it holds nothing. Local.
    def remaining = @latest ? @latest.remaining : 0.0

    # The fencing token of its hold, even after its loss until it is unlocked; nil if there is none.
    def token = @latest && !@latest.released? ? @latest.token : nil

    def inspect = "#<Etcdlock::Mutex #{@name}#{" held" if held?}>"

    private

    def acquire(held, timeout)
      limit = Native.seconds("timeout", timeout)
      take(held) { @native.lock(limit) }
    end

    # The hold is in its place before an interrupt can come between.
    def take(held, &start)
      Thread.handle_interrupt(Object => :never) do
        outcome = Native.wait(&start)
        held[0] = @latest = Hold.new(outcome, @name) if outcome.hold?
      end
    end

    # An interrupt that comes before the hold is handed out releases it.
    def keep
      held = []
      handed_out = false
      yield held
      handed_out = true
      held[0]
    ensure
      held[0]&.send(:give_up) unless handed_out
    end
  end
end
