'use strict'

// Finds the native part: beside this file in a checkout, else in the package for this platform.

function load() {
  const abis = process.platform === 'linux' ? ['-gnu', '-musl'] : ['']
  const reasons = []
  for (const abi of abis) {
    const platform = `${process.platform}-${process.arch}${abi}`
    for (const place of [`./etcdlock.${platform}.node`, `etcdlock-${platform}`]) {
      try {
        return require(place)
      } catch (error) {
        reasons.push(`${place}: ${error.message.split('\n', 1)[0]}`)
      }
    }
  }
  throw new Error(
    `etcdlock has no native part for ${process.platform} ${process.arch} here. It comes as the optional package ` +
      `etcdlock-${process.platform}-${process.arch}${abis[0]}; install without --omit=optional, and on the platform it runs on.\n  ` +
      reasons.join('\n  '),
  )
}

module.exports = load()
