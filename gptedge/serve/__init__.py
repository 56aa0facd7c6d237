"""The local server: an OpenAI-compatible HTTP API over one model. Needs starlette and uvicorn (`gptedge[serve]`).

    server ─▶ guard ─▶ app ─▶ requests (reads)   engine ─▶ cache_pool (computes)   responses, transport (write)

Importing this package imports neither of them; `gptedge.serve.server.run` is what starts a server.
"""
