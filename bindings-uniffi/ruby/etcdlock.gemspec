# frozen_string_literal: true

Gem::Specification.new do |gem|
  gem.name = "etcdlock"
  # That of Cargo.toml: the Makefile gives it, and a test compares them.
  gem.version = ENV.fetch("ETCDLOCK_VERSION")
  gem.platform = "x86_64-linux"
  gem.summary = "A distributed mutex on etcd: leases that renew themselves, fencing tokens, one round trip"
  gem.authors = ["The etcdlock authors"]
  gem.homepage = "https://github.com/etcdlock/etcdlock"
  gem.licenses = %w[MIT Apache-2.0]
  gem.required_ruby_version = ">= 3.1"
  gem.files = Dir["lib/**/*.rb", "lib/**/*.so", "README.md", "LICENSE-*"]
  gem.add_dependency "ffi", "~> 1.15"
  gem.metadata = { "rubygems_mfa_required" => "true" }
end
