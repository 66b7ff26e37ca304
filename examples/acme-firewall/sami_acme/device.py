"""The appliance, as far as it can be without being one: flows and bans by zone, behind a REST interface.

    python -m sami_acme.device 8089

GET /                         what it is, how much it holds and can hold
GET /zones/ZONE               the zone's flows
POST /zones/ZONE   [FLOW...]  puts flows in; one of the same ends makes way
PATCH /zones/ZONE  {ID: N}    gives flows N seconds to live
DELETE /zones/ZONE [ID...]    takes flows out; says which were there
"""

import argparse
import itertools
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Appliance(ThreadingHTTPServer):
    """Serves from the constructor on; `close` ends it."""

    def __init__(self, port=0, capacity=10000):
        super().__init__(("127.0.0.1", port), Handler)
        self.lock = threading.Lock()
        self.capacity = capacity
        self.zones = {}
        self.ids = itertools.count(1)
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def close(self):
        self.shutdown()
        self.server_close()

    def flows(self, zone):
        """Those that have time left, by id."""
        now = time.monotonic()
        held = self.zones.setdefault(zone, {})
        for known in [known for known, flow in held.items() if flow["expires"] <= now]:
            del held[known]
        return held

    def insert(self, zone, flow):
        held = self.flows(zone)
        for known in [known for known, other in held.items() if ends(other) == ends(flow)]:
            del held[known]
        held[next(self.ids)] = {**flow, "expires": time.monotonic() + flow["seconds"]}


def ends(flow):
    return flow["protocol"], sorted((flow["from"], flow["to"]))


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def answer(self):
        device, zone = self.server, self.path.rpartition("/")[2]
        said = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or "null")
        with device.lock:
            held = device.flows(zone) if zone else {}
            match self.command:
                case "GET" if zone:
                    now = time.monotonic()
                    told = [
                        {**flow, "id": known, "seconds": int(flow["expires"] - now + 0.5)}
                        for known, flow in held.items()
                    ]
                case "GET":
                    in_use = sum(len(device.flows(known)) for known in device.zones)
                    told = {"serial": self.server.url, "capacity": device.capacity, "in_use": in_use}
                case "POST":
                    told = [device.insert(zone, flow) for flow in said]
                case "PATCH":
                    told = [held[int(known)].update(expires=time.monotonic() + n) for known, n in said.items()]
                case "DELETE":
                    told = [held.pop(known, None) is not None for known in said]
        body = json.dumps(told).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST = do_PATCH = do_DELETE = answer

    def log_message(self, *words):
        pass


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m sami_acme.device", description="Serves an appliance.")
    parser.add_argument("port", type=int, nargs="?", default=8089, help="on 127.0.0.1 (8089)")
    print(Appliance(parser.parse_args().port).url, flush=True)
    threading.Event().wait()
