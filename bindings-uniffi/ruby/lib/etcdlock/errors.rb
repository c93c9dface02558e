# frozen_string_literal: true

module Etcdlock
  # Every exception of etcdlock. The message says what happened, to which name and target, and what to do.
  class Error < StandardError
    # The name of the kind, the same in every language, such as "TIMEOUT".
    def self.kind = const_get(:KIND)

    def kind = self.class.kind
  end

  # The exceptions, by the kinds' names.
  BY_KIND = {
    # The time given to lock ran out before the lock was free. Nothing is left behind.
    "TIMEOUT" => LockTimeout = Class.new(Error),
    # Somebody else holds the lock. In Ruby try_lock returns nil instead.
    "BUSY" => LockBusy = Class.new(Error),
    # The hold was lost before the call. Another holder may be at work, so stop.
    "LOST" => LockLost = Class.new(Error),
    # There is nothing to release.
    "NOT_HELD" => NotHeld = Class.new(Error),
    # The call was cancelled.
    "CANCELLED" => Cancelled = Class.new(Error),
    # The target could not be reached in time.
    "UNAVAILABLE" => Unavailable = Class.new(Error),
    # The target refused the credentials or the permission.
    "DENIED" => Denied = Class.new(Error),
    # An argument breaks a rule; the message names the value and the rule.
    "INVALID" => Invalid = Class.new(Error),
    # The session has been closed.
    "CLOSED" => Closed = Class.new(Error),
    # The session was made before fork and belongs to the parent process. Connect anew in the child.
    "FORKED" => Forked = Class.new(Error),
    # A blocking call on a thread of the library's own could never return, so it is refused. (Ruby code never runs there.)
    "DEADLOCK" => Deadlock = Class.new(Error),
    # A defect in etcdlock. Please report it.
    "INTERNAL" => Internal = Class.new(Error)
  }.freeze
  BY_KIND.each { |kind, error| error.const_set(:KIND, kind) }
  private_constant :BY_KIND

  # The exception for an error of the core's.
  def self.error(kind, text) = BY_KIND.fetch(kind, Internal).new(text)
  private_class_method :error
end
