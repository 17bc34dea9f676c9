// SPDX-License-Identifier: Apache-2.0
// The same as http_client.py, on Node's http.Agent; takes the same plan.
'use strict';

const crypto = require('crypto');
const fs = require('fs');
const http = require('http');

const plan = JSON.parse(process.argv[2]);
const answers = [];
const sockets = new Set();

function exchange(agent, [method, path, upload]) {
  return new Promise((resolve, reject) => {
    const options = { host: '127.0.0.1', port: plan.port, method, path, agent };
    const request = http.request(options, (response) => {
      const digest = crypto.createHash('sha256');
      response.on('data', (chunk) => digest.update(chunk));
      response.on('error', reject);
      response.on('end', () => {
        answers.push([method, path, response.statusCode, digest.digest('hex')]);
        resolve();
      });
    });
    request.on('socket', (socket) => sockets.add(socket));
    request.on('error', reject);
    if (upload === null) {
      request.end();
    } else {
      fs.createReadStream(upload).pipe(request);
    }
  });
}

async function work(agent) {
  for (const request of plan.requests) {
    await exchange(agent, request);
  }
}

async function main() {
  const agents = [];
  for (let i = 0; i < plan.connections; i++) {
    agents.push(new http.Agent({ keepAlive: true, maxSockets: 1 }));
  }
  await Promise.all(agents.map(work));
  console.log(JSON.stringify({ connects: sockets.size, answers }));
  process.stdin.resume();
  process.stdin.on('end', () => agents.forEach((agent) => agent.destroy()));
}

main();
