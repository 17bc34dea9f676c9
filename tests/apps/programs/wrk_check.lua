-- SPDX-License-Identifier: Apache-2.0
-- Compares every body with a file and prints the figures as one line of JSON.

local threads = {}

function setup(thread)
   table.insert(threads, thread)
end

function init(args)
   local file = assert(io.open(args[1], "rb"))
   expected = file:read("*a")
   file:close()
   different = 0
end

function response(status, headers, body)
   if body ~= expected then
      different = different + 1
   end
end

function done(summary, latency, requests)
   local different = 0
   for _, thread in ipairs(threads) do
      different = different + thread:get("different")
   end
   local errors = summary.errors
   io.write(string.format(
      '{"requests": %d, "bytes": %d, "connect": %d, "read": %d, "write": %d, '
      .. '"timeout": %d, "status": %d, "different": %d}\n',
      summary.requests, summary.bytes, errors.connect, errors.read, errors.write,
      errors.timeout, errors.status, different))
end
