"""``--compare old.json``: what changed since an earlier run, and whether that is more than the noise of both."""

from __future__ import annotations

from typing import Any


def ratios(found: dict[str, Any]) -> dict[tuple[str, str, str], tuple[float, float]]:
    """(topic, optimizer, case): the ratio that the topic is about, and its noise floor."""
    taken = {}
    for topic, results in found["results"].items():
        for r in results:
            if "failed" in r:
                continue
            if topic == "step" and r["rows"]["fused_l2"]["ratio_to_torch_fused"]:
                ratio = r["rows"]["fused_l2"]["ratio_to_torch_fused"][1]
            elif topic in ("train", "churn") and "torch fused" in r["rows"]:
                ratio = r["rows"]["torch fused"]["ours_to_this"][1]
            elif topic == "limit":
                ratio = r["rows"]["fused_l2"]["of the copy"][1]
            elif topic in ("clip", "statistics"):
                ratio = r["ratio"][1] if topic == "clip" else 1 / r["cost"][1]
            else:
                continue
            taken[topic, r["optimizer"], r["case"]] = ratio, r["noise floor"]
    return taken


def table(old: dict[str, Any], new: dict[str, Any]) -> str:
    """One line per ratio that both runs have; ratios to the same peer, so that machines of another speed can be compared."""
    if not isinstance(old.get("results"), dict):
        return "the old file was not written by this version of python -m bench: nothing to compare"
    before, after = ratios(old), ratios(new)
    lines = [
        f"compared with {old['machine']['date']}, {old['machine']['cpu']}, commit {old['machine'].get('commit', 'unknown')}"
    ]
    lines.append(f"  {'':44}{'before':>9}{'now':>9}{'change':>9}{'noise':>9}")
    for key in (key for key in after if key in before):
        (then, noise_then), (now, noise_now) = before[key], after[key]
        change, noise = now / then - 1, (noise_then**2 + noise_now**2) ** 0.5
        verdict = "" if abs(change) <= noise else ("faster" if change > 0 else "SLOWER")
        lines.append(f"  {' '.join(key):44}{then:>9.2f}{now:>9.2f}{100 * change:>+8.1f}%{100 * noise:>8.1f}%  {verdict}")
    if len(lines) == 2:
        return lines[0] + "\n  no case in common"
    return "\n".join(lines)
