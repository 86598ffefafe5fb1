"""Made result records of every kind, in the formats that `fastload bench` writes, from one seed."""

import json

import numpy as np

PEERS = [
    ("cpu", "fastload", "antialiased bilinear", 3357, 0.57, 884.6),
    ("cpu-exact", "fastload, exact decode", "antialiased bilinear", 3230, 0.60, 885.0),
    ("dali", "NVIDIA DALI (CPU)", "antialiased bilinear", 2010, 0.95, 1320.0),
    ("spdl", "SPDL", "bicubic", 1510, 1.21, 960.4),
    ("ffcv", "FFCV", "area", 1379, 1.36, 1556.4),
    ("grain", "Grain", "antialiased bilinear", 612, 3.1, 1710.9),
    ("torch", "PyTorch DataLoader with torchvision", "antialiased bilinear", 405, 4.8, 1403.0),
    ("albumentations", "Albumentations", "bilinear, not antialiased", 398, 4.9, 1388.0),
]
ENVIRONMENT = {
    "date": "2026-11-24T10:20:30+00:00",
    "commit": "943596f0aa11",
    "cpu": "AMD EPYC",
    "cores": 2,
    "ram_gib": 23.5,
    "system": "Linux 6.18.44 x86_64",
    "hardware": "cloud or shared machine",
    "python": "3.11.7",
    "versions": {"fastload": "0.1.0", "torch": "2.15.0", "numpy": "2.4.6"},
    "load_average": 1.31,
    "file_bytes": 112587232,
    "page_cache": "100% of the file",
}


class Maker:
    """Records from one random generator, so that the same seed makes the same file."""

    def __init__(self, seed=0):
        self.rng = np.random.default_rng(seed)

    def series(self, median, unit="images/s", noise=0.06, n=7):
        rounds = [round(float(v), 4) for v in median * (1 + self.rng.uniform(-noise, noise, n))]
        return self.of(rounds, unit)

    @staticmethod
    def of(rounds, unit="images/s"):
        middle = float(np.median(rounds))
        return {
            "unit": unit,
            "n": len(rounds),
            "median": round(middle, 4),
            "min": min(rounds),
            "max": max(rounds),
            "noise": round((max(rounds) - min(rounds)) / 2 / middle, 4) if middle else 0.0,
            "rounds": rounds,
        }

    def ratio(self, a, b):
        return self.of([round(x / y, 4) for x, y in zip(a["rounds"], b["rounds"])], "x")

    def comparison(self, workload, what, unit, baseline, rows, failed=(), date=ENVIRONMENT["date"]):
        lower = unit in ("s", "MiB")
        return self.record(
            "compare",
            date=date,
            workload=workload,
            what=what,
            unit=unit,
            better="lower" if lower else "higher",
            baseline=baseline,
            rows=sorted(rows, key=lambda row: row["figure"]["median"] * (1 if lower else -1)),
            failed=list(failed),
            settings={"data": "photos.tar", "rounds": 7, "images_per_round": 1000, "threads": 2, "batch": 64},
        )

    def record(self, kind, **values):
        date = values.pop("date", ENVIRONMENT["date"])
        return {
            "kind": kind,
            **values,
            "settings": values.get("settings", {"rounds": 7, "threads": 2, "batch_size": 64, "size": 224}),
            "environment": {**ENVIRONMENT, "date": date},
            "notes": values.get("notes", []),
            "seconds": 61.5,
        }

    def row(self, peer, figure, baseline=None, threads=2, extra=None):
        name, title, resize, _, cpu, mib = peer
        return {
            "peer": name,
            "title": title,
            "filter": resize,
            "figure": figure,
            "ratio": self.ratio(figure, baseline) if baseline else None,
            "cpu_s_per_1000": self.series(cpu, "CPU s per 1,000 images"),
            "peak_mib": mib,
            "settings": f"{title} as its documentation recommends, {threads} threads",
            "versions": {name: "1.2.3"},
            "python": "3.11.7",
            "threads": threads,
            "check": {"passed": True, "mean_levels": 1.15},
            "extra": extra or {},
        }

    def compare(self, workload="train500", date=ENVIRONMENT["date"]):
        noises = {"grain": 0.3}
        figures = {p[0]: self.series(p[3], noise=noises.get(p[0], 0.06)) for p in PEERS}
        rows = [self.row(p, figures[p[0]], figures["ffcv"]) for p in PEERS]
        what = "random crop to 224 and flip to uint8, from JPEG of at most 500 px, quality 90"
        failed = [
            {"peer": "mosaic", "reason": "mosaicml-streaming does not install on Python 3.11.7 here"},
            {"peer": "tfdata", "reason": "its process ended with signal 11 in round 3"},
        ]
        return self.comparison(workload, what, "images/s", "ffcv", rows, failed, date)

    def start(self):
        figures = {p[0]: self.series(0.3 + 0.9 * i, "s") for i, p in enumerate(PEERS)}
        rows = [self.row(p, figures[p[0]], extra={"import_s": 0.25, "loader_s": 0.05}) for p in PEERS]
        for row in rows:  # how many times as good as the baseline: less is better
            row["ratio"] = self.ratio(figures["ffcv"], row["figure"])
        return self.comparison("start", "from the start of the process to the first batch", "s", "ffcv", rows)

    def threads(self):
        rows = []
        for place, peer in enumerate(PEERS[:6]):
            for count in (1, 2, 4, 8):
                speed = peer[3] * count ** (0.95 - 0.08 * place)
                rows.append(self.row(peer, self.series(speed), threads=count))
        return self.comparison(
            "threads", "train500 with 1, 2, 4 and 8 threads or workers", "images/s", "ffcv", rows
        )

    def memory(self):
        rows = []
        for place, peer in enumerate(PEERS[:7]):
            growth = np.cumsum(self.rng.uniform(0, 1.5 * (place == 5) * 12 + 0.4, 50))
            mib = [round(float(peer[5] + value), 1) for value in growth]
            extra = {"mib_by_epoch": mib, "growth_mib": round(mib[-3] - mib[7], 1)}
            rows.append(self.row(peer, self.of(mib, "MiB"), extra=extra))
        return self.comparison("memory", "resident memory after each epoch", "MiB", "ffcv", rows)

    def change(self, what, setting, side, both, times, cost):
        figure = self.series(both["median"] * times)
        return {
            "what": what,
            "setting": setting,
            "side": side,
            "figure": figure,
            "ratio": self.ratio(figure, both),
            "cost": cost,
            "gain": times > 1.03,
        }

    def bench(self, date=ENVIRONMENT["date"], model="resnet18"):
        loader, alone, both = self.series(1180), self.series(2450), self.series(1140)
        stages = [
            ("read", 14.2, 41200),
            ("crop", 31.7, 30800),
            ("decode", 388.0, 301056),
            ("resize", 142.5, 301056),
            ("colour", 55.3, 150528),
            ("normalise", 38.9, 602112),
            ("copy", 12.4, 602112),
        ]
        total = sum(us for _, us, _ in stages)
        changes = [
            self.change(
                "smaller stored images",
                "fastload convert photos photos.beton --max-side 320",
                "loader",
                both,
                1.62,
                "31 MB of disk less, 40 s to convert",
            ),
            self.change("more threads", "--threads 4", "loader", both, 1.21, "none"),
            self.change(
                "raw store",
                "fastload convert photos photos.beton --store raw",
                "loader",
                both,
                1.08,
                "1.2 GB of disk more, 52 s to convert",
            ),
            self.change("channels_last off", "--no-channels-last", "model", both, 0.93, "none"),
        ]
        steps, t = [], 0.0
        for i in range(120):
            wait = float(self.rng.uniform(0.001, 0.03) + (0.08 if i % 17 == 0 else 0))
            work = float(self.rng.uniform(0.024, 0.028))
            steps.append({"t": round(t, 4), "wait_s": round(wait, 5), "step_s": round(work, 5)})
            t += wait + work
        return self.record(
            "bench",
            date=date,
            loader=loader,
            loader_without_per_image=None,
            model=alone,
            both=both,
            stall=self.of([0.41, 0.44, 0.42, 0.4, 0.43], "share"),
            first_batch_s=0.381,
            stages=[
                {"stage": name, "us": us, "bytes": size, "share": round(us / total, 4)}
                for name, us, size in stages
            ],
            resources={"peak_mib": 1410.5, "cpu_s_per_1000_images": 1.62, "gpu_peak_mib": None},
            limits={
                "memory_gb_s": 21.4,
                "copy_gb_s": None,
                "decoder_images_s": 1320.0,
                "disk_mb_s": 1450.0,
                "model_tflops": 1.9,
                "shares": {"memory": 0.31, "decoder": 1.14, "model": 0.62},
            },
            changes=changes,
            not_run=[{"what": "compile", "why": "torch.compile needs a C++ compiler, and none was found"}],
            timeline=steps,
            bottleneck="loader",
            ratio=2.076,
            change_first="smaller stored images",
            verdict="The loader is the bottleneck, 2.1x slower than the other side.",
            settings={
                "data": ["photos.beton"],
                "images": 500,
                "model": model,
                "size": 224,
                "batch_size": 64,
                "device": "cuda",
                "amp": "bf16",
                "threads": 2,
                "cores": 2,
                "prefetch": 2,
                "transforms": ["RandomResizedCrop(size=224)", "HorizontalFlip()", "Normalize()"],
                "store": "jpeg",
                "stored_side": 500,
                "rounds": 7,
                "shared_cores": False,
            },
        )

    def tune(self):
        tried = [
            {
                "threads": t,
                "prefetch": p,
                "batch_size": b,
                "images_s": round(700 * t**0.8 + 20 * p + b / 8, 1),
            }
            for t in (1, 2)
            for p in (2, 4)
            for b in (32, 64)
        ]
        figure, default = self.series(1297), self.series(1210)
        return self.record(
            "tune",
            tried=tried,
            default=tried[5],
            best=tried[7],
            figure=figure,
            default_figure=default,
            ratio=self.ratio(figure, default),
            sentence="2 threads, 4 batches ahead and batches of 64 load 1.07x as fast as the defaults.",
            paste="fastload.Loader('photos.beton', 64, threads=2, prefetch=4)\nfastload train photos.beton --threads 2 --batch-size 64",
            settings={"data": ["photos.beton"], "size": 224, "rounds": 7},
        )

    def model(self):
        rows = []
        for name, base in (("resnet18", 210), ("convnext_tiny", 48)):
            plain = self.series(base)
            variants = [
                ("plain", False, "off", False, 1.0, "none"),
                ("channels_last", True, "off", False, 1.31, "none"),
                ("channels_last + bf16", True, "bf16", False, 1.94, "none"),
                ("channels_last + bf16 + compile", True, "bf16", True, 2.2, "31 s to compile"),
            ]
            made = []
            for title, last, amp, compiled, times, cost in variants:
                figure = plain if title == "plain" else self.series(base * times)
                made.append(
                    {
                        "name": title,
                        "channels_last": last,
                        "amp": amp,
                        "compile": compiled,
                        "cuda_graph": False,
                        "figure": figure,
                        "ratio": self.ratio(figure, plain),
                        "cost": cost,
                    }
                )
            rows.append(
                {
                    "model": name,
                    "size": 224,
                    "batch_size": 64,
                    "variants": made,
                    "best": made[-1]["name"],
                    "loader_needs_images_s": made[-1]["figure"]["median"],
                    "failed": [
                        {
                            "name": "channels_last + bf16 + CUDA graph",
                            "reason": "CUDA graphs need a CUDA device",
                        }
                    ],
                }
            )
        return self.record("model", rows=rows, settings={"device": "cpu", "rounds": 7})

    def everything(self):
        return [
            self.bench("2026-11-20T08:00:00+00:00"),
            self.bench(),
            self.tune(),
            self.model(),
            self.compare("train500", "2026-11-21T09:00:00+00:00"),
            self.compare(),
            self.start(),
            self.threads(),
            self.memory(),
        ]


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path
