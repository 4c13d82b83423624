"""Whether promises held under load. In: what clients saw, what the server's process held; out: a result."""

import asyncio
import statistics
from collections.abc import Callable, Coroutine
from dataclasses import asdict
from typing import Any

from crowd.load import BUSY, Seen, fairness, percentile, until_idle
from crowd.servers import Held

MOST_GROWTH_BYTES = 20 << 20  # after the warm-up
JUDGED_AFTER_S = 60.0  # before, what oneDNN prepares for each shape fills its caches
MOST_UNFAIR = 3.0  # a client's mean wait, or its number of requests, beside the median client's
FREE_WITHIN_S = 10.0
LOOK_EVERY_S = 0.5
SHOWN_PROBLEMS = 20


class Watch:
    """What a process holds, over time."""

    def __init__(self, held: Callable[[], Held]) -> None:
        self.held = held
        self.before = held()
        self.warm = self.before
        self.rss_bytes = [self.before.rss_bytes]

    async def during(self, work: Coroutine[Any, Any, Any], *, warm_s: float) -> None:
        """Look until the work is done; what is held after `warm_s` is the reference for growth."""
        done = asyncio.ensure_future(work)
        elapsed_s = 0.0
        while not done.done():
            await asyncio.wait([done], timeout=LOOK_EVERY_S)
            elapsed_s += LOOK_EVERY_S
            now = self.held()
            self.rss_bytes.append(now.rss_bytes)
            if elapsed_s <= warm_s:
                self.warm = now
        await done


async def result_of(seen: Seen, watch: Watch, port: int, clients: int) -> dict[str, Any]:
    """The figures, and each promise with whether it held."""
    idle_after_s, health = await until_idle(port, within_s=FREE_WITHIN_S)
    await asyncio.sleep(1.0)  # closed connections are cleared away
    after, share = watch.held(), fairness(seen, clients)
    growth_bytes = after.rss_bytes - watch.warm.rss_bytes
    promises = {
        "no wrong text": not seen.problems and seen.greedy_checked > 0,
        "slots free": idle_after_s < FREE_WITHIN_S,
        "descriptors": after.descriptors <= watch.before.descriptors,
        "threads": after.threads <= max(watch.warm.threads, watch.before.threads),
        "all served": share["requests_min"] > 0,
    }
    if BUSY not in seen.statuses:  # those who are refused come back at times of their own
        promises["fair"] = share["mean_wait_max_of_median"] <= MOST_UNFAIR
        promises["fair"] &= share["requests_min"] * MOST_UNFAIR >= share["requests_median"]
    if seen.elapsed_s >= JUDGED_AFTER_S:
        promises["memory"] = growth_bytes <= MOST_GROWTH_BYTES
    return {
        "passed": all(promises.values()),
        "promises": promises,
        "problems": [len(seen.problems), *seen.problems[:SHOWN_PROBLEMS]],
        **figures(seen, clients),
        "fairness": share,
        "idle_after_s": idle_after_s,
        "rss_growth_bytes": growth_bytes,
        "peak_rss_bytes": max(watch.rss_bytes),
        "rss_mb_every_half_second": [n // 1_000_000 for n in watch.rss_bytes],
        "held": {"before": asdict(watch.before), "warm": asdict(watch.warm), "after": asdict(after)},
        "health": health,
    }


def figures(seen: Seen, clients: int) -> dict[str, Any]:
    """Counts, rates and times."""
    first = [each.first_token_s for each in seen.served if each.first_token_s is not None]
    waited = [each.waited_s for each in seen.served if each.first_token_s is not None]
    between = [gap for each in seen.served for gap in each.between_tokens_s]
    tokens = sum(each.tokens for each in seen.served)
    return {
        "clients": clients,
        "elapsed_s": seen.elapsed_s,
        "requests": sum(seen.kinds.values()),
        "kinds": dict(seen.kinds),
        "statuses": {str(status): n for status, n in sorted(seen.statuses.items())},
        "served": len(seen.served),
        "left": seen.left,
        "greedy_texts_equal": seen.greedy_checked - sum("wrong text" in each for each in seen.problems),
        "greedy_texts": seen.greedy_checked,
        "drawn_texts_equal": seen.drawn_equal,
        "drawn_texts": seen.drawn_checked,
        "tokens": tokens,
        "tokens_per_s": tokens / seen.elapsed_s,
        "first_token_s": {f"p{p}": percentile(first, p) for p in (50, 95, 99)},
        "first_token_with_refusals_s": {f"p{p}": percentile(waited, p) for p in (50, 95, 99)},
        "between_tokens_s": {
            "p50": statistics.median(between) if between else float("nan"),
            "p95": percentile(between, 95),
        },
    }
