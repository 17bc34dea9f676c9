-- SPDX-License-Identifier: Apache-2.0
-- Prints one line that starts with "report " when wrk is done.
function done(summary, latency, requests)
   local errors = summary.errors
   io.write(string.format(
      "report %d %d %d %d %d %d %d %d %.3f %.3f\n",
      summary.requests, summary.duration, summary.bytes,
      errors.connect, errors.read, errors.write, errors.status, errors.timeout,
      latency:percentile(50), latency:percentile(99)))
end
