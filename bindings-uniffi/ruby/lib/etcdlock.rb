# frozen_string_literal: true

require_relative "etcdlock/errors"
begin
  # What is generated has indentations that ruby -w does not like.
  verbose, $VERBOSE = $VERBOSE, nil
  require_relative "etcdlock/etcdlock_native"
ensure
  $VERBOSE = verbose
end
require_relative "etcdlock/native"
require_relative "etcdlock/process"
require_relative "etcdlock/session"
require_relative "etcdlock/mutex"
require_relative "etcdlock/hold"

# A distributed mutex on etcd.
#
#   Etcdlock.connect("127.0.0.1:2379", ttl: 10) do |session|
#     session.mutex("/orders/42").synchronize(timeout: 5) { |hold| ... }
#   end
#
# Threads that wait let the others run, and so do fibers under a scheduler. All times are in seconds.
module Etcdlock
  VERSION = EtcdlockNative.version.freeze

  class << self
    # Where log lines go: a Logger. With nil, the default, only the warning of a forgotten hold is printed, by Kernel#warn.
    attr_accessor :logger

    # Connects to where locks live and opens a session: one lease, renewed in the background until the session is closed.
    # With a block, gives it the session and closes it in the end.
    #
    # target:: "127.0.0.1:2379", "http://a:2379,http://b:2379", "https://...", an array of those, or "memory:NAME" (in
    #          this process); nil: $ETCDLOCK_ENDPOINTS, else 127.0.0.1:2379
    # ttl:: how long the lease lives without a renewal, at least 2 (default 15): a crashed holder's lock is free after it
    # namespace:: a prefix for every lock name of the session
    # user, password:: etcd's own authentication
    # ca, cert, key:: PEM, as text or as a path
    # server_name:: the name in the server's certificate, where it differs from the endpoint's host
    # owner:: a label that others see in Session#contenders (default host:pid)
    # connect_timeout:: how long to try to reach the target (default 5); it does not bound the session's life
    # max_hold:: release a hold that is kept longer than this (default: never)
    #
    # Blocks until connected. Raises Invalid for a bad argument and Denied for wrong credentials, both at once, and
    # Unavailable when the target cannot be reached in time.
    def connect(target = nil, ttl: nil, namespace: nil, user: nil, password: nil, ca: nil, cert: nil, key: nil,
                server_name: nil, owner: nil, connect_timeout: nil, max_hold: nil)
      This.begin
      options = Native.call do
        EtcdlockNative::ConnectOptions.new(
          language: EtcdlockNative::Language::RUBY, ttl: Native.seconds("ttl", ttl), namespace:, user:,
          password: Native.secret("password", password),
          ca: ca&.to_s, cert: cert&.to_s, key: Native.secret("key", key&.to_s), server_name:, owner:,
          connect_timeout: Native.seconds("connect_timeout", connect_timeout), max_hold: Native.seconds("max_hold", max_hold)
        )
      end
      targets = target && Array(target)
      session = Session.new(Native.wait { EtcdlockNative.connect(targets, options) }.session)
      return session unless block_given?

      Native.and_finally(-> { session.close }) { yield session }
    end
  end
end
