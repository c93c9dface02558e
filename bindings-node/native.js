'use strict'

// Finds the native part: beside this file in a checkout, else in the package for this platform. Each name is written out, and
// stands in a `try`: so bundlers find what they have to take along, and do without what is not there.

function load() {
  const here = `${process.platform}-${process.arch}`
  const reasons = []
  let cause
  const missed = (place, error) => {
    cause = error
    reasons.push(`\n  ${place}: ${error.message.split('\n', 1)[0]}`)
  }
  if (here === 'linux-x64') {
    try {
      return require('./etcdlock.linux-x64-gnu.node')
    } catch (error) {
      missed('./etcdlock.linux-x64-gnu.node', error)
    }
    try {
      return require('etcdlock-linux-x64-gnu')
    } catch (error) {
      missed('etcdlock-linux-x64-gnu', error)
    }
  }
  throw new Error(
    `etcdlock has no native part for ${process.platform} ${process.arch} here. ` +
      (reasons.length
        ? `It comes as the optional package etcdlock-linux-x64-gnu; install without --omit=optional, and on the platform it runs on.${reasons.join('')}`
        : 'There is one for linux x64.'),
    { cause },
  )
}

module.exports = load()
