"""For the interpreter of .venv-vllm: prompts decoded by vLLM with a head of ours.

python vllm_worker.py JOB.json RESULT.json. The job names the target (None: the head names its own), the head, how many
tokens a cycle drafts, the tokens to make and the prompts' ids. The result has, for each prompt, its tokens and
vLLM's own counts of cycles and of accepted drafts.
"""

import json
import os
import sys

os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_KVCACHE_SPACE="1", VLLM_LOGGING_LEVEL="WARNING"
)


def counts(llm):
    found = {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}
    names = ("num_drafts", "num_accepted_tokens")
    return [int(found.get(f"vllm:spec_decode_{name}", 0)) for name in names]


def main(job, result):
    from vllm import LLM, SamplingParams

    drafting = {"model": job["head"], "method": "eagle3", "num_speculative_tokens": job["drafted"]}
    model = (
        {"model": job["target"], "speculative_config": drafting} if job["target"] else {"model": job["head"]}
    )
    llm = LLM(
        **model, dtype="float32", max_model_len=512, max_num_seqs=1, enforce_eager=True, disable_log_stats=False,
        enable_prefix_caching=False, skip_tokenizer_init=True,
    )  # fmt: skip
    sampling = SamplingParams(temperature=0, max_tokens=job["tokens"], detokenize=False)
    done, before = [], counts(llm)
    for ids in job["prompts"]:
        output = llm.generate([{"prompt_token_ids": ids}], sampling, use_tqdm=False)[0].outputs[0]
        after = counts(llm)
        cycles, accepted = (b - a for a, b in zip(before, after, strict=True))
        done.append({"tokens": list(output.token_ids), "cycles": cycles, "accepted": accepted})
        before = after
    with open(result, "w") as file:
        json.dump(done, file)


if __name__ == "__main__":
    with open(sys.argv[1]) as file:
        main(json.load(file), sys.argv[2])
