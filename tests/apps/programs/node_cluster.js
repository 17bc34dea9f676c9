// SPDX-License-Identifier: Apache-2.0
// node_server.js in two workers: the primary accepts and passes each connection on.
'use strict';

const cluster = require('cluster');

cluster.schedulingPolicy = cluster.SCHED_RR;
if (cluster.isPrimary) {
  cluster.fork();
  cluster.fork();
  process.on('SIGTERM', () => cluster.disconnect());
} else {
  require('./node_server.js');
}
