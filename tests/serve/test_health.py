from __future__ import annotations

import json
import re
from typing import Any

from glm4serve import Settings
from tests.helpers.asgi import ASK, CHAT, ask
from tests.helpers.fake_engine import ROOT, words
from tests.serve.conftest import Serve


def test_an_engine_that_does_not_come_round(serve: Serve) -> None:
    app, engine = serve(words("x"), Settings(stall_limit=5))
    assert ask(app, "/health").json() == {
        "status": "ok",
        "models": {"m": {"healthy": True, "last_step_age": 0.0}},
    }
    engine.last_step_age = 6.0
    response = ask(app, "/health")
    assert response.status_code == 503 and response.json()["models"]["m"] == {
        "healthy": False,
        "last_step_age": 6.0,
        "reason": "it doesn't come round",
    }
    assert ask(app, "/ready").status_code == 503
    engine.last_step_age, engine.healthy, engine.death = 0.0, False, "OSError: /home/me/bundle"
    assert ask(app, "/health").json()["models"]["m"]["reason"] == "its thread has died"  # anybody may ask: no more
    assert ask(app, "/health").status_code == ask(app, "/ready").status_code == 503


def samples(app: Any) -> dict[str, float]:
    lines = [line for line in ask(app, "/metrics").text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}


def test_metrics_have_vllm_s_names(serve: Serve) -> None:
    app, _ = serve(words("a", "b", "c"))
    assert samples(app)['glm4:num_requests_running{model_name="m"}'] == 0
    ask(app, CHAT, ASK)
    ask(app, CHAT, {**ASK, "stream": True})
    ask(app, CHAT, {})
    found = samples(app)
    model = '{model_name="m"}'
    for name, value in {
        "num_requests_running": 0,
        "num_requests_waiting": 0,
        "kv_cache_usage_perc": 0,
        "prompt_tokens_total": 11,
        "generation_tokens_total": 5,
        "prefix_cache_queries_total": 11,
        "prefix_cache_hits_total": 3,
        "time_to_first_token_seconds_count": 2,
        "inter_token_latency_seconds_count": 4,
        "e2e_request_latency_seconds_count": 2,
        "request_queue_time_seconds_count": 2,
        "request_prefill_time_seconds_count": 2,
        "request_decode_time_seconds_count": 2,
    }.items():
        assert found[f"glm4:{name}{model}"] == value, name
    assert found['glm4:request_success_total{finished_reason="stop",model_name="m"}'] == 2
    assert found[f'glm4:http_responses_total{{path="{CHAT}",status="400"}}'] == 1


def test_the_dashboard_asks_for_metrics_that_there_are(serve: Serve) -> None:
    app, _ = serve(words("a", "b"))
    ask(app, CHAT, ASK)
    there = {name.split("{")[0] for name in samples(app)}
    dashboard = json.loads((ROOT / "docs" / "grafana.json").read_text(encoding="utf-8"))
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]
    asked = {name for query in queries for name in re.findall(r"glm4:\w+", query)}
    assert len(asked) >= 10 and asked <= there


def test_slots_are_told_where_that_is_wanted(serve: Serve) -> None:
    app, _ = serve()
    assert ask(app, "/slots").status_code == 404
    app, _ = serve((), Settings(slots_page=True))
    assert ask(app, "/slots").json()[0]["slots"] == 4


def test_models(serve: Serve) -> None:
    app, _ = serve()
    listed = ask(app, "/v1/models").json()["data"]
    assert [(model["id"], model["max_model_len"]) for model in listed] == [("m", 512)]
    assert ask(app, "/v1/models/m").json() == listed[0]
    assert ask(app, "/v1/models/a/b").json()["error"]["code"] == "model_not_found"
