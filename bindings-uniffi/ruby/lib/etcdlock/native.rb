# frozen_string_literal: true

require "io/wait"

module Etcdlock
  # A lock lives in its process: it can neither be written down nor be doubled.
  module NotCopied
    def marshal_dump = raise(TypeError, "#{self.class} lives in its process and cannot be dumped; give its name, or its token")

    def initialize_copy(_other) = raise(TypeError, "#{self.class} cannot be copied")
  end

  # How calls reach the native part, and how their results are waited for.
  #
  # UniFFI's calls keep Ruby's global lock, so none of them waits. What takes time is started, and rings a bell, which is a
  # pipe, when its result is there. Ruby waits for pipes as it waits for sockets: other threads run meanwhile, so do other
  # fibers under a scheduler, and Thread#raise, Thread#kill, Timeout and Ctrl-C end the wait.
  module Native
    extend self

    # Asked too often for UniFFI's way of calling: see quick.rs.
    module Quick
      extend FFI::Library
      ffi_lib File.expand_path("libetcdlock_uniffi.so", __dir__)
      attach_function :etcdlock_uniffi_is_held, [:uint64], :int8
    end

    # A pipe that the native side owns.
    class Bell
      attr_reader :native

      def initialize
        @native = EtcdlockNative::Bell.new
        @io = IO.for_fd(@native.descriptor, autoclose: false)
      end

      def wait = @io.wait_readable

      def clear = @io.read_nonblock(1, exception: false)
    end

    # Runs a call; its failure becomes the exception of its kind.
    def call
      yield
    rescue EtcdlockNative::Failure::Failed => e
      error = Etcdlock.send(:error, e.kind, e.text)
      This.stay_quiet_at_exit
      raise error, cause: nil
    rescue TypeError, EncodingError => e
      raise Invalid, e.message
    end

    # A name, which is text.
    def text(what, value)
      string(what, value)
      return value unless value.encoding == Encoding::UTF_8 && !value.valid_encoding?

      raise Invalid, "#{what} #{value.inspect} is not valid UTF-8"
    end

    # Text that nobody is to see, in a message either.
    def secret(what, value)
      return value if value.nil? || (value.is_a?(String) && (value.encoding != Encoding::UTF_8 || value.valid_encoding?))

      raise Invalid, "#{what} is not a String of valid text (its value is not shown)"
    end

    # A key or a value, which may be any bytes.
    def string(what, value)
      return value if value.is_a?(String)

      raise Invalid, "#{what} #{value.inspect} is not a String"
    end

    def seconds(what, value)
      return if value.nil?
      raise Invalid, "#{what} #{value.inspect} is not a number of seconds" if value.is_a?(String) || !value.respond_to?(:to_f)

      value.to_f
    end

    # Starts what the block returns and waits for its result. Whatever ends the wait cancels the call, and it is undone
    # in the background. Interrupts come through where it waits, and nowhere else.
    def wait
      Thread.handle_interrupt(Object => :on_blocking) do
        started = call { yield }
        bell = This.bells.pop || call { Bell.new }
        begin
          bell.wait unless started.ring(bell.native)
          call { started.result }
        ensure
          started.cancel
          # A bell that has not been rung by now never will be. Reading from it is a place where interrupts come through.
          Thread.handle_interrupt(Object => :never) { bell.clear }
          This.bells.push(bell)
        end
      end
    end

    # Runs the block and then `last`, whatever happens. The error of the block wins over one of `last`.
    def and_finally(last)
      raising = false
      begin
        yield
      rescue Exception
        raising = true
        raise
      ensure
        # First of all: an interrupt that came between would skip the rest.
        Thread.handle_interrupt(Object => :on_blocking) do
          last.call
        rescue Error
          raise unless raising
        end
      end
    end
  end
  private_constant :Native
end
