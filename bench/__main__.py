"""`python -m bench [NAME]`: all benchmarks or one; ends with one line each, `bench NAME ratio=R`."""

from __future__ import annotations

import sys

from bench import company, growth, mailbox, relay
from bench.harness import BenchError, Result

BENCHMARKS = {
    "pass-through": relay.pass_through,
    "relay-ed25519": relay.relay_ed25519,
    "relay-hybrid": relay.relay_hybrid,
    "large-message": relay.large_message,
    "memory-25mb": relay.memory_25mb,
    "open-mailbox": mailbox.open_mailbox,
    "postfix-relay": company.postfix_relay,
    "added-latency": company.added_latency,
    "postgres-store": company.postgres_store,
    "postgres-nodes": company.postgres_nodes,
    "store-growth": growth.store_growth,
    "soak-memory": growth.soak_memory,
}


def main(names: list[str]) -> int:
    unknown = [name for name in names if name not in BENCHMARKS]
    if unknown:
        print(f"bench: there is no {unknown[0]}; there are: {', '.join(BENCHMARKS)}", file=sys.stderr)
        return 2
    results: list[Result] = []
    failed = False
    for name in names or BENCHMARKS:
        print(f"{name} ...", flush=True)
        try:
            result = BENCHMARKS[name]()
        except BenchError as error:
            print(f"{name}: {error}", file=sys.stderr)
            failed = True
            continue
        print(f"  {result.text} (wanted {result.wanted})", flush=True)
        results.append(result)
    print()
    for result in results:
        print(result)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
