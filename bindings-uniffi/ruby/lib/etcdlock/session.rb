# frozen_string_literal: true

module Etcdlock
  # One who holds a lock or waits for it. age is in seconds, or nil.
  Contender = Struct.new(:holder, :owner, :host, :pid, :language, :token, :age, :key, keyword_init: true) do
    alias_method :holder?, :holder
  end

  # Counters of a session, from its start:
  # locks:: Locks acquired.
  # waits:: Of those, the ones that had to wait for another holder, here or elsewhere.
  # hand_overs:: Of those, the ones that were passed on inside this process, in one request.
  # live_tickets:: Places that the session has in queues now, as holder or as waiter.
  # holds_lost:: Holds lost, for whatever reason.
  # lost_deadline:: Of those: no renewal was confirmed before the deadline.
  # lost_lease_gone:: Of those: the lease had expired or was revoked.
  # lost_key_deleted:: Of those: the key was deleted from outside.
  # lost_refused:: Of those: a guarded write was refused.
  # lost_max_hold:: Of those: kept longer than max_hold.
  # lost_closed:: Of those: the session was closed.
  # leases_lost:: Leases lost; the session got itself a new one after each.
  # renewals:: Renewals sent.
  # requests:: Requests sent to the store by all sessions that share its connection.
  # watch_events:: Events heard by all sessions that share the connection.
  # reconnections:: Connections and watch streams that had to be opened anew, by all sessions that share them.
  Stats = Struct.new(
    :locks,
    :waits,
    :hand_overs,
    :live_tickets,
    :holds_lost,
    :lost_deadline,
    :lost_lease_gone,
    :lost_key_deleted,
    :lost_refused,
    :lost_max_hold,
    :lost_closed,
    :leases_lost,
    :renewals,
    :requests,
    :watch_events,
    :reconnections,
    keyword_init: true
  )

  # A connection to where locks live, with one lease that is renewed in the background until the session is closed.
  #
  # Made by Etcdlock.connect. Any number of threads and mutexes may share it. If its lease is lost, its holds are lost, and
  # it gets itself a new lease: waiters go on waiting, and new locks work. The end of the process closes it.
  class Session
    include NotCopied

    def initialize(native)
      @native = native
    end

    # A mutex of this name. Local: nothing is sent. Mutexes of one name exclude each other, here and everywhere. Raises
    # Invalid for a name that is empty, over 1,024 bytes or has a NUL, and Closed.
    def mutex(name) = Mutex.new(Native.call { @native.mutex(Native.text("the lock name", name)) })

    # Who holds the lock of this name and who waits for it, in order. Entries of etcd's own clients show too. Blocks for
    # one request, at most 5 s; raises Unavailable or Denied.
    def contenders(name)
      Native.wait { @native.contenders(Native.text("the lock name", name)) }.contenders.map do |c|
        Contender.new(holder: c.is_holder, owner: c.owner, host: c.host, pid: c.pid, language: c.language, token: c.token,
                      age: c.age, key: c.key)
      end
    end

    # Releases all holds, revokes the lease and ends the session. Blocks until etcd has confirmed it, at most timeout
    # seconds; then raises Unavailable, and the lease ends by itself within its TTL. Closing twice is fine.
    def close(timeout: 5)
      limit = Native.seconds("timeout", timeout) || 5.0
      Native.wait { @native.close(limit) }
      nil
    end

    # The TTL that etcd granted, in seconds; it may be longer than what was asked for.
    def ttl = @native.ttl

    # The id of the lease, which changes when the session had to get a new one; nil while it has none.
    def lease_id = @native.lease_id

    # What the session has done so far.
    def stats
      s = @native.stats
      Stats.new(**Stats.members.to_h { |name| [name, s.public_send(name)] })
    end

    def inspect = "#<Etcdlock::#{@native.text}>"
  end
end
