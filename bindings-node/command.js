#!/usr/bin/env node
'use strict'

// `npx etcdlock run NAME -- COMMAND`: the same program as the command `etcdlock`.

process.exit(require('./native.js').command(process.argv.slice(2)))
