-- wrk: posts the files given after `--`, in turn, in the form of the first argument; the result as one line of JSON.
local bodies, kind, turn = {}, nil, 0

function init(args)
  kind = args[1]
  local head = '--x\r\nContent-Disposition: form-data; name="image"; filename="a.jpg"\r\nContent-Type: image/jpeg\r\n\r\n'
  for number = 2, #args do
    local file = assert(io.open(args[number], "rb"))
    local photo = file:read("*a")
    file:close()
    local headers = { ["Content-Type"] = kind == "raw" and "image/jpeg" or "multipart/form-data; boundary=x" }
    local body = kind == "raw" and photo or head .. photo .. "\r\n--x--\r\n"
    bodies[number - 1] = wrk.format("POST", nil, headers, body)
  end
end

function request()
  turn = turn % #bodies + 1
  return bodies[turn]
end

function done(summary, latency)
  local failed = summary.errors
  io.write(string.format(
    '{"requests": %d, "seconds": %f, "p50": %f, "p99": %f, "bad": %d, "broken": %d}\n',
    summary.requests, summary.duration / 1e6, latency:percentile(50) / 1e3, latency:percentile(99) / 1e3,
    failed.status, failed.connect + failed.read + failed.write + failed.timeout))
end
