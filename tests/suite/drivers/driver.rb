# frozen_string_literal: true

# The suite's driver for Ruby: a thread for each request. See ../README.md.

require "etcdlock"
require "json"

$stdout.sync = true
Giving_up = Class.new(StandardError)
SESSIONS, MUTEXES, HOLDS, OPS = {}, {}, {}, {}

def now = Process.clock_gettime(Process::CLOCK_BOOTTIME, :nanosecond)

def say(**line) = $stdout.write("#{JSON.generate(line)}\n")

def seconds(request, name) = request[name] && request[name] / 1000.0

def state(mutex)
  seen = now
  { held: mutex.held?, remaining: (mutex.remaining * 1000).floor, token: mutex.token || 0, seen: }
end

def granted(name, hold)
  return { kind: "BUSY", message: "" } unless hold

  HOLDS[name] = hold
  hold.on_lost { |error| say(event: "lost", mutex: name, token: hold.token, reason: error.message, at: now) }
  state(MUTEXES[name])
end

CALLS = {
  "connect" => lambda do |r|
    given = r.slice("namespace", "owner", "user", "password").transform_keys(&:to_sym)
    times = %w[ttl connect_timeout max_hold].to_h { |name| [name.to_sym, seconds(r, name)] }
    session = SESSIONS[r["session"]] = Etcdlock.connect(r["target"], **given, **times)
    { ttl: (session.ttl * 1000).to_i, lease: session.lease_id.to_i.to_s }
  end,
  "mutex" => ->(r) { MUTEXES[r["mutex"]] = SESSIONS[r["session"]].mutex(r["name"]) },
  "lock" => lambda do |r|
    hold = Thread.handle_interrupt(Giving_up => :on_blocking) { MUTEXES[r["mutex"]].lock(timeout: seconds(r, "timeout")) }
    granted(r["mutex"], hold)
  end,
  "cancel" => ->(r) { OPS[r["op"]]&.raise(Giving_up, "") },
  "try_lock" => ->(r) { granted(r["mutex"], MUTEXES[r["mutex"]].try_lock) },
  "unlock" => ->(r) { MUTEXES[r["mutex"]].unlock },
  "state" => ->(r) { state(MUTEXES[r["mutex"]]) },
  "check" => ->(r) { HOLDS[r["mutex"]].check },
  "put" => ->(r) { HOLDS[r["mutex"]].put(r["key"], r["value"]) },
  "get" => ->(r) { { value: HOLDS[r["mutex"]].get(r["key"])&.force_encoding("UTF-8") } },
  "delete" => ->(r) { HOLDS[r["mutex"]].delete(r["key"]) },
  "inspect" => lambda do |r|
    { contenders: SESSIONS[r["session"]].contenders(r["name"]).map { |c| { **c.to_h, age: c.age ? (c.age * 1000).floor : -1 } } }
  end,
  "stats" => ->(r) { SESSIONS[r["session"]].stats.to_h },
  "close" => ->(r) { SESSIONS[r["session"]].close(timeout: (r["timeout"] || 5000) / 1000.0) }
}.freeze

def serve(request, from)
  result =
    begin
      CALLS.fetch(request["do"]).call(request)
    rescue Giving_up
      { kind: "CANCELLED", message: "" }
    rescue Etcdlock::Error => e
      { kind: e.kind, message: e.message }
    end
  OPS.delete(request["id"])
  say(id: request["id"], from:, at: now, **(result.is_a?(Hash) ? result : {}))
end

say(driver: "ruby", version: Etcdlock::VERSION, lacks: "")
$stdin.each_line do |line|
  request, from = JSON.parse(line), now
  # Interrupts come where a lock waits, and nowhere else.
  Thread.handle_interrupt(Giving_up => :never) { OPS[request["id"]] = Thread.new { serve(request, from) } }
end
exit!(true)
