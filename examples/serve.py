"""Serve a sliced model over HTTP: POST a prompt, get its continuation. One request at a time, for a trial.

python examples/serve.py sliced --port 8000
curl --data "The first telescope" localhost:8000
"""

import argparse
from http.server import BaseHTTPRequestHandler, HTTPServer

import slicegpt_fast as sf

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model", help="folder of a sliced model, or any other model")
parser.add_argument("--port", type=int, default=8000)
parser.add_argument("--new-tokens", type=int, default=64)
options = parser.parse_args()

tokenizer = sf.load_tokenizer(options.model)
model = sf.patch_model(sf.load_model(options.model))


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        prompt = self.rfile.read(int(self.headers["Content-Length"])).decode()
        inputs = tokenizer(prompt, return_tensors="pt")
        tokens = model.generate(**inputs, max_new_tokens=options.new_tokens, do_sample=False)[0]
        self.send_response(200)
        self.send_header("Content-Type", "text/plain; charset=utf-8")
        self.end_headers()
        self.wfile.write(tokenizer.decode(tokens, skip_special_tokens=True).encode())


with HTTPServer(("127.0.0.1", options.port), Handler) as server:
    print(f"serving on http://127.0.0.1:{server.server_port}", flush=True)
    server.serve_forever()
