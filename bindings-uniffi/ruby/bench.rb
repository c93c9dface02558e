# frozen_string_literal: true

# Figures of one thread: a pair of lock and unlock, and the question whether a hold is held.

require "etcdlock"

def microseconds(rounds)
  start = Process.clock_gettime(Process::CLOCK_MONOTONIC, :float_microsecond)
  rounds.times { yield }
  format("%.2f us", (Process.clock_gettime(Process::CLOCK_MONOTONIC, :float_microsecond) - start) / rounds)
end

["memory:", ENV.fetch("ETCDLOCK_ENDPOINTS")].each do |target|
  Etcdlock.connect(target) do |session|
    mutex = session.mutex("/bench/ruby")
    puts "Ruby, #{target}: lock and unlock #{microseconds(1000) { mutex.lock.unlock }}"
    mutex.synchronize { |hold| puts "Ruby, #{target}: held? #{microseconds(1_000_000) { hold.held? }}" }
  end
end
