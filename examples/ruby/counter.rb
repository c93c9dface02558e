# frozen_string_literal: true

# Adds to a number in a file, together with any other programs, one at a time.
#
#     ruby counter.rb TARGET FILE ROUNDS lock|nolock

require "etcdlock"

target, file, rounds, how = ARGV
abort "usage: counter TARGET FILE ROUNDS lock|nolock" unless ARGV.size == 4
$stdout.sync = true

def now = Process.clock_gettime(Process::CLOCK_MONOTONIC, :microsecond)

add_one = lambda do
  value = File.read(file).to_i + 1
  sleep 0.0002 # somebody else may come between
  # In place and always ten digits: one step, so that a reader never finds half a number.
  File.write(file, format("%010d", value), 0)
  value
end

Etcdlock.connect(target, ttl: 10) do |session|
  mutex = session.mutex("/demo/counter")
  rounds.to_i.times do
    next puts "token=- value=#{add_one.call} waited_us=0" if how == "nolock"

    start = now
    mutex.synchronize do |hold|
      waited = now - start
      puts "token=#{hold.token} value=#{add_one.call} waited_us=#{waited}"
    end
  end
end
