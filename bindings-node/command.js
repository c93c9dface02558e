#!/usr/bin/env node
'use strict'

// `npx etcdlock run NAME -- COMMAND`: the same program as the command `etcdlock`.

// The program passes signals on to its command. Node's own handlers, which end the process, have to
// make room first; these here never run, because the event loop does not turn.
for (const signal of ['SIGINT', 'SIGTERM', 'SIGHUP', 'SIGQUIT', 'SIGUSR1', 'SIGUSR2']) {
  process.on(signal, () => {})
}
process.exit(require('./native.js').command(process.argv.slice(2)))
