# frozen_string_literal: true

module Etcdlock
  # One successful acquisition, from lock to unlock or loss.
  #
  # Losing it does not stop your code: look at held?, hear of it with on_lost, and let the resource refuse old tokens, or
  # write through put. A hold that is forgotten is released by the garbage collector, with a warning.
  class Hold
    # The fencing token: an Integer strictly larger than that of every earlier hold of this name.
    attr_reader :token

    # The name of the lock, with the session's namespace.
    attr_reader :name

    include NotCopied

    def initialize(outcome, name)
      @native = outcome.hold
      @address = outcome.address
      @token = outcome.token
      @name = name
      @released = false
      @listeners = []
    end

    # Whether the hold still owns the lock, as far as can be known here. Local and quick; false from the deadline on, even
    # if the process was stopped meanwhile.
    def held? = Native::Quick.etcdlock_uniffi_is_held(@address) == 1

    # Seconds for which the hold is good without another renewal; 0.0 if it is lost or released. Local.
    def remaining = @native.remaining

    # Returns if held?; else raises LockLost, NotHeld or Forked. Local.
    def check = Native.call { @native.check }

    # Why the hold was lost, as text; nil if it was not.
    def loss = @native.loss

    # Whether it was unlocked. (A hold that was lost can still be unlocked, which says so.)
    def released? = @released

    # Calls the block once with a LockLost when the hold is lost: at once if it is lost already, never if it is released
    # first. The blocks of all holds run one after the other on one thread, "etcdlock-events".
    def on_lost(&block)
      raise ArgumentError, "on_lost needs a block" unless block

      @listeners << block
      # Reported again for each: who was told before has left the list.
      @native.report_loss(This.watch(self))
      self
    end

    # Releases the lock. Blocks until etcd has confirmed it, at most 5 s; an interrupt ends only the wait. Raises NotHeld if
    # it was released before, LockLost if it was lost before, or Unavailable: released here, and the key goes on being deleted.
    def unlock
      Native.wait { release }
      nil
    end

    # Writes key, only if this hold still owns the lock, atomically in etcd. Keys and values are Strings of any bytes; the
    # key is used as given, without the namespace. Blocks for one request, at most 5 s. Raises LockLost if nothing was
    # written, and Unavailable if it may or may not have been.
    def put(key, value)
      Native.wait { @native.put(Native.string("the key", key), Native.string("the value", value)) }
      nil
    end

    # Reads key, only if this hold still owns the lock; nil if there is no such key. See put.
    def get(key)
      outcome = Native.wait { @native.get(Native.string("the key", key)) }
      outcome.bytes? ? outcome.bytes : nil
    end

    # Deletes key, only if this hold still owns the lock; deleting what is not there is fine. See put.
    def delete(key)
      Native.wait { @native.delete(Native.string("the key", key)) }
      nil
    end

    def inspect = "#<Etcdlock::Hold #{@name} token=#{@token}#{" held" if held?}>"

    private

    def release
      @listeners.clear
      started = @native.unlock
      @released = true
      started
    end

    # Released in the background: for a hold that came too late.
    def give_up = release

    def hear_of_loss(text)
      error = Etcdlock.send(:error, "LOST", text)
      while (listener = @listeners.shift)
        listener.call(error)
      end
    end
  end
end
