"""Both ends of Search-R1's `/retrieve` protocol.

| module | what |
|---|---|
| `service` | the service: protocol, limits of a request, `serve` |
| `guard` | host, token and body of a request, checked before it costs anything |
| `connections` | uvicorn with deadlines and a bound on connections |
| `metrics` | what a service counts, for Prometheus |
| `client` | `RemoteRetriever` |
"""
