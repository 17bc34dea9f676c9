// SPDX-License-Identifier: Apache-2.0
// Serves the files of a directory and digests what is sent, with keep-alive.
'use strict';

const crypto = require('crypto');
const fs = require('fs');
const http = require('http');
const path = require('path');

const [directory, port] = process.argv.slice(2);

const server = http.createServer((request, response) => {
  const [way, name] = request.url.slice(1).split('/');
  if (request.method === 'POST') {
    const digest = crypto.createHash('sha256');
    request.on('data', (chunk) => digest.update(chunk));
    request.on('end', () => response.end(digest.digest('hex')));
    return;
  }
  const file = path.join(directory, path.basename(name));
  if (way === 'file') {
    response.end(fs.readFileSync(file));
  } else {
    response.setHeader('Content-Length', fs.statSync(file).size);
    fs.createReadStream(file).pipe(response);
  }
});

server.keepAliveTimeout = 20000;
server.listen(Number(port), '127.0.0.1');
process.on('SIGTERM', () => server.close());
