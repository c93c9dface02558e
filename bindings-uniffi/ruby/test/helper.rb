# frozen_string_literal: true

require "etcdlock"
require "json"
require "minitest/autorun"
require "net/http"
require "open3"
require "rbconfig"
require "timeout"

# A look at etcd from outside, through its JSON gateway.
module Outside
  ETCD = ENV.fetch("ETCDLOCK_ENDPOINTS") { abort "$ETCDLOCK_ENDPOINTS is not set: run `make test`, which starts an etcd" }

  module_function

  def ask(path, body)
    JSON.parse(Net::HTTP.post(URI("http://#{ETCD}/v3/#{path}"), JSON.generate(body), "Content-Type" => "application/json").body)
  end

  def range(name) = { key: ["#{name}/"].pack("m0"), range_end: ["#{name}0"].pack("m0") }

  def keys(name) = ask("kv/range", range(name)).fetch("kvs", []).map { |kv| kv["key"].unpack1("m") }

  def delete_keys(name) = ask("kv/deleterange", range(name))

  def revoke(lease) = ask("lease/revoke", { ID: lease.to_s })
end

# Whoever runs tests in the background may have them ignore Ctrl-C, and the programs they start with them.
trap(:INT, "DEFAULT")

class EtcdlockTest < Minitest::Test
  include Outside

  TARGETS = ["memory:minitest", Outside::ETCD].freeze
  # The one that this process has loaded.
  LIBRARY = File.dirname($LOADED_FEATURES.grep(%r{/etcdlock\.rb\z}).first)
  NAMES = Enumerator.produce(1, &:succ)
  HEADER = <<~RUBY
    $stdout.sync = true
    require "etcdlock"
    require "timeout"
    target, name = ARGV
    # Runs after the library's own, with the other threads alive.
    at_exit { sleep 0.02 }
    session = Etcdlock.connect(target, ttl: 60)
    mutex = session.mutex(name)
  RUBY

  # Defines a test that runs on each store.
  def self.on_each(sentence, &test)
    TARGETS.each do |target|
      where = target.start_with?("memory:") ? "memory" : "etcd"
      define_method("test_#{sentence.tr(" ", "_")}_on_#{where}") { instance_exec(target, &test) }
    end
  end

  def self.once(sentence, &test) = define_method("test_#{sentence.tr(" ", "_")}", &test)

  # A hang fails.
  def run = Timeout.timeout(120) { super }

  def fresh_name = "/ruby/#{Process.pid}/#{NAMES.next}"

  def connect(target = ETCD, **options, &block) = Etcdlock.connect(target, **options, &block)

  def eventually
    deadline = Process.clock_gettime(Process::CLOCK_MONOTONIC) + 60
    until (seen = yield)
      raise "not seen within 60 s" if Process.clock_gettime(Process::CLOCK_MONOTONIC) > deadline

      sleep 0.005
    end
    seen
  end

  def nothing_is_left(session, name) = eventually { session.contenders(name).empty? }

  # A thread that does not talk about how it ends.
  def thread(&work)
    Thread.new do
      Thread.current.report_on_exception = false
      work.call
    end
  end

  def until_waiting(thread) = eventually { thread.status == "sleep" }

  # Runs Ruby in a process of its own: [what it said, what it said on standard error, exit code].
  def ruby(code, *args, &during)
    command = [RbConfig.ruby, "-w", "-I", LIBRARY, "-e", HEADER + code]
    Open3.popen3(*command, *args) do |stdin, stdout, stderr, process|
      during&.call(stdin, stdout, process.pid)
      stdin.close unless stdin.closed?
      [stdout.read, stderr.read, process.value.exitstatus]
    end
  end
end
