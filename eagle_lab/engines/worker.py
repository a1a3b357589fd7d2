"""The process of an arm that this one can't decode itself. It runs in any Python from 3.10 on, by file name.

    python worker.py ENGINE

It needs the standard library and its engine, nothing of this package. It reads requests from the standard input and
answers each with one JSON line (`protocol.py` has their fields). What its engine prints goes to the log.
"""

import importlib.metadata
import inspect
import json
import os
import re
import subprocess
import sys
import time

PROTOCOL = 1
VLLM = (0, 26)  # on an H100; 0.32 on a CPU


class Refused(Exception):
    """What can't be done, in one sentence."""


def version(package):
    """The version of an installed package. Raises Refused where there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        raise Refused(
            f"there is no {package} in {sys.executable}; name the environment that has it as python="
        ) from None


def cut(ids, limit, ends):
    """The ids up to the limit and the first that ends the text; whether it is over."""
    for at, token in enumerate(ids[:limit]):
        if token in ends:
            return ids[: at + 1], True
    return ids[:limit], len(ids) >= limit


def watched(steps, limit, ends, start):
    """The answer to `decode` from steps that give (committed ids, ids known beyond them), by the host's clock. Raises
    Refused where they give no token."""
    known, beyond, cycles, at = [], [], [], []
    for committed, beyond in steps:
        at.append(time.perf_counter() - start)
        known += committed
        cycles.append(len(committed))
        if cut(known + beyond, limit, ends)[1]:
            break
    tokens = cut(known + beyond, limit, ends)[0]
    if not tokens:
        raise Refused("its decode ended without a token")
    return answer_of(at, tokens, cycles)


def answer_of(at, tokens, cycles=None):
    """The answer to `decode`. at: the seconds at which tokens came; cycles: how many tokens each cycle committed."""
    times = {"seconds": at[-1], "first_token_seconds": at[0], "arrivals_s": at}
    return dict(times, tokens=tokens, cycles=cycles)


# ---- an engine: → what `hello` says of it, and its `load`; a load → facts, and its `decode`


def eagle_lab(told):
    """This project's own decoder, of whatever revision comes first on PYTHONPATH. Raises Refused where that isn't the arm's
    folder."""
    import eagle_lab

    if told["code"] and not os.path.samefile(eagle_lab.ROOT, told["code"]):
        raise Refused(f"code is {told['code']!r}, where no eagle_lab/ lies")

    def load(told):
        import torch

        try:
            from eagle_lab.decode.generate import plain_stream
            from eagle_lab.decode.strategy import Decoding

            whole = False
        except ImportError:  # a revision that gives a plain decode whole
            whole = True
        if told["threads"]:
            torch.set_num_threads(told["threads"])
        more = join(told["device"]) if told["tensor_parallel_size"] > 1 else {}
        shape = told["target"].startswith("shape:")
        if told["quantization"]:
            if "quantization" not in inspect.signature(eagle_lab.load).parameters:
                raise Refused(f"its code has no quantization, and the arm names {told['quantization']}")
            more["quantization"] = told["quantization"]
        draft = None if shape else told["draft"] or None
        pair = eagle_lab.load(
            told["target"] or None, draft, told["device"], told["dtype"], verbose=False, **more
        )
        sampling = told["sampling"]
        facts = {"device": str(pair.device), "dtype": str(pair.dtype)[6:], "threads": torch.get_num_threads()}

        def decode(ids, limit, seed):
            chosen = dict(strategy=told["strategy"], seed=seed, **sampling)
            start = time.perf_counter()
            if not told["plain"]:
                steps = eagle_lab.stream(pair, ids, limit, record=False, **told["shape"], **chosen)
            elif not whole:
                steps = plain_stream(pair, ids, Decoding.of(limit, **chosen))
            else:
                tokens = eagle_lab.generate_plain(pair, ids, limit, **chosen).tokens
                return {"seconds": time.perf_counter() - start, "tokens": tokens}
            found = watched(((list(c.committed), [c.bonus]) for c in steps), limit, pair.eos, start)
            return dict(found, cycles=None) if told["plain"] else found

        return facts, decode

    otherwise = "" if told["code"] else os.environ.get("EAGLE_LAB_COMMIT", "")
    return {"version": revision(eagle_lab.ROOT, otherwise)}, load


def revision(folder, otherwise=""):
    """The git commit of a folder's code; `otherwise`, or that it isn't known, where git has none."""
    asked = subprocess.run(
        ["git", "-C", str(folder), "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    )
    return asked.stdout.strip() or otherwise[:9] or "unknown"


def join(device):
    """Join the processes that split the target, by a file; → how `load` is told. They listen on the loopback alone.

    Raises Refused where there are fewer GPUs than processes.
    """
    import torch
    import torch.distributed

    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if device == "cuda" and torch.cuda.device_count() < size:
        raise Refused(
            f"tensor_parallel_size={size} needs as many GPUs, and here are {torch.cuda.device_count()}"
        )
    if os.path.isdir("/sys/class/net/lo"):
        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ.setdefault(name, "lo")
    if device == "cuda":
        torch.cuda.set_device(rank)
    torch.distributed.init_process_group(
        init_method="file://" + os.environ["EAGLE_LAB_MEETING"], rank=rank, world_size=size
    )
    return {"tp_plan": "auto"}


def others(engine, told):
    """The further processes of an arm that several decode together: workers like this one, which get each request too."""
    size = told["tensor_parallel_size"]
    if engine != "eagle_lab" or size == 1 or "RANK" in os.environ:
        return []
    meeting = os.path.join(os.environ["EAGLE_LAB_PLACE"], "meeting")
    os.environ.update(WORLD_SIZE=str(size), RANK="0", LOCAL_RANK="0", EAGLE_LAB_MEETING=meeting)
    return [
        subprocess.Popen(
            [sys.executable, os.path.abspath(__file__), engine], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
            env={**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank)}, text=True,
        )
        for rank in range(1, size)
    ]  # fmt: skip


def official(told):
    """A folder of SafeAILab/EAGLE or of a fork; nothing in it is changed. Raises Refused for another folder."""
    if not os.path.isdir(os.path.join(told["code"], "eagle", "model")):
        raise Refused(f"{told['code']} has no folder eagle/model, so it is no checkout of SafeAILab/EAGLE")
    for package in ("torch", "transformers"):
        version(package)
    sys.path.insert(0, told["code"])
    import random

    import numpy
    import torch
    from eagle.model.ea_model import EaModel

    def load(told):
        if told["threads"]:
            torch.set_num_threads(told["threads"])
        tree = told["shape"]
        model = EaModel.from_pretrained(
            base_model_path=told["target"], ea_model_path=told["draft"], torch_dtype=getattr(torch, told["dtype"]),
            total_token=tree["total_tokens"] + 1, depth=tree["depth"], top_k=tree["top_k"], device_map=told["device"],
        )  # fmt: skip
        model.eval()
        sampling = told["sampling"]
        asked = {"temperature": sampling["temperature"], "top_p": sampling["top_p"]}
        asked["top_k"] = float(sampling["top_k_sampling"])
        generate = model.naive_generate if told["plain"] else model.ea_generate

        def steps(ids, limit):
            prompt = torch.tensor([ids], device=told["device"])
            done = len(ids)
            for all_ids in generate(prompt, max_new_tokens=limit, max_length=told["context"] + 100, **asked):
                new = all_ids[0, done:].tolist()  # waits for the device
                done += len(new)
                yield new, []

        def decode(ids, limit, seed):
            if seed is not None:
                torch.manual_seed(seed)
                random.seed(seed)
                numpy.random.seed(seed % 2**32)
            ends = {model.tokenizer.eos_token_id, *told["ends"]}
            start = time.perf_counter()
            found = watched(steps(ids, limit), limit, ends, start)
            return dict(found, cycles=None) if told["plain"] else found

        facts = {"torch": torch.__version__, "device": told["device"], "dtype": told["dtype"]}
        return dict(facts, threads=torch.get_num_threads()), decode

    own = os.path.exists(os.path.join(told["code"], ".git"))
    return {"version": revision(told["code"]) if own else "a folder"}, load


def vllm(told):
    """vLLM's offline class, one request at a time, stepped so that each step's tokens have a time. Raises Refused where it
    is not there, or a decode goes wrong."""
    found = version("vllm") if told["device"] != "cpu" else cpu_version()
    at_least(found, VLLM, "vllm")
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_NO_USAGE_STATS="1", VLLM_HOST_IP="127.0.0.1")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    if told["threads"] and cores:
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", ",".join(map(str, cores[: told["threads"]])))
    from vllm import LLM, SamplingParams

    def load(told):
        drafted = told["shape"]["total_tokens"]
        drafting = {"method": "eagle3", "model": told["draft"], "num_speculative_tokens": drafted}
        if told["target"].startswith("shape:"):
            raise Refused("vllm has no random weights of a shape; name a folder as target")
        llm = LLM(
            model=told["target"], dtype=told["dtype"], quantization=told["quantization"] or None, max_num_seqs=1,
            max_model_len=told["context"], enable_prefix_caching=False, skip_tokenizer_init=True, disable_log_stats=False,
            seed=0, **({} if told["plain"] else {"speculative_config": drafting}),
            **on_device(told["device"]),
        )  # fmt: skip
        sampling, ends = told["sampling"], set(told["ends"])

        def counted():
            now = {m.name: m.value for m in llm.get_metrics() if hasattr(m, "value")}
            return [int(now.get("vllm:spec_decode_num_" + name, 0)) for name in ("drafts", "accepted_tokens")]

        number = iter(range(10**9))

        def decode(ids, limit, seed):
            asked = SamplingParams(
                temperature=sampling["temperature"], top_p=sampling["top_p"], top_k=sampling["top_k_sampling"] or -1,
                max_tokens=limit, seed=seed, stop_token_ids=sorted(ends), ignore_eos=not ends, detokenize=False,
            )  # fmt: skip
            before, at, sizes, tokens = counted(), [], [], ()
            start = time.perf_counter()
            llm.llm_engine.add_request(str(next(number)), {"prompt_token_ids": ids}, asked)
            while llm.llm_engine.has_unfinished_requests():
                for out in llm.llm_engine.step():
                    known = tuple(out.outputs[0].token_ids)
                    if len(known) > len(tokens):
                        at.append(time.perf_counter() - start)
                        sizes.append(len(known) - len(tokens))
                        tokens = known
            drafts, accepted = (b - a for a, b in zip(before, counted(), strict=True))
            answer = answer_of(at, tokens)
            if told["plain"]:
                return answer
            # the first step is the prefill; what runs over the limit was committed too
            if len(sizes) == drafts + 1:
                sizes[-1] += drafts + accepted - sum(sizes[1:])
                return dict(answer, cycles=sizes[1:])
            return dict(answer, cycle_count=drafts, committed=drafts + accepted)

        return {"threads": told["threads"], "device": told["device"], "dtype": told["dtype"]}, decode

    return {"version": found}, load


def on_device(device):
    """vLLM's options on a device. On a GPU: small batches, and no more memory than leaves room for the other arm."""
    if device == "cpu":
        return {"enforce_eager": True}
    return {"performance_mode": "interactivity", "gpu_memory_utilization": 0.4}


def at_least(found, least, package):
    """Raise Refused for a version older than `least`, (major, minor)."""
    numbers = tuple(int(word) for word in re.findall(r"\d+", found)[:2])
    if numbers < least:
        raise Refused(
            f"{package} {found} is older than {'.'.join(map(str, least))}, the oldest that was tried"
        )


def cpu_version():
    """The version of vLLM for a CPU, which has a package of its own."""
    try:
        return version("vllm-cpu")
    except Refused:
        return version("vllm")


def unready(*told):
    """In place of what an earlier request gives. Raises Refused."""
    raise Refused("hello comes before load, and load before decode")


ENGINES = {"eagle_lab": eagle_lab, "official": official, "vllm": vllm}


def main(engine):
    """Answer requests until the last one."""
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what anybody prints goes to the log
    sys.path[:] = [
        p for p in sys.path if os.path.abspath(p or ".") != os.path.dirname(os.path.abspath(__file__))
    ]
    load = decode = unready
    beside = []
    for line in sys.stdin:
        request = json.loads(line)
        ask = request.pop("ask")
        try:
            if ask == "hello":
                beside = others(engine, request)
            for other in beside:
                other.stdin.write(line)
                other.stdin.flush()
            if ask == "end":
                break
            if ask == "hello":
                said, load = ENGINES[engine](request)
                answer = dict(said, protocol=PROTOCOL, engine=engine)
            elif ask == "load":
                facts, decode = load(request)
                answer = {"facts": facts}
            else:
                answer = decode(request["prompt_ids"], request["max_new_tokens"], request["seed"])
        except Refused as error:
            answer = {"error": str(error)}
        except Exception as error:
            import traceback

            traceback.print_exc()
            # vLLM raises pydantic's errors, which have their sentences apart.
            sentences = [each["msg"] for each in getattr(error, "errors", list)()]
            answer = {"error": "; ".join(sentences) or f"{type(error).__name__}: {error}"}
        channel.write(json.dumps(dict(answer, answer=ask)) + "\n")
        channel.flush()


if __name__ == "__main__":
    main(sys.argv[1])
