"""`nuteprune prune`: the whole method on any supported checkpoint."""

from __future__ import annotations

from nuteprune.cli import options as o
from nuteprune.console import Output
from nuteprune.errors import UserError
from nuteprune.jobs.prune import run
from nuteprune.jobs.show import print_report, print_results


def prune(
    model: o.Model,
    out: o.Out,
    sparsity: o.Sparsity = None,
    shape: o.ShapeFile = None,
    data: o.Data = None,
    eval_data: o.EvalData = None,
    steps: o.Steps = None,
    batch_size: o.BatchSize = None,
    length: o.Length = None,
    method: o.Method = None,
    gates: o.Gates = None,
    shapes: o.Shapes = None,
    neuron_multiple: o.NeuronMultiple = None,
    hidden_multiple: o.HiddenMultiple = None,
    device: o.Device = None,
    dtype: o.Dtype = None,
    bits: o.Bits = None,
    text_column: o.TextColumn = None,
    seed: o.Seed = None,
    report_to: o.ReportTo = None,
    config: o.Config = None,
    assignments: o.Set = None,
    gradient_checkpointing: o.Checkpointing = False,
    dry_run: o.DryRun = False,
    resume: o.Resume = False,
    overwrite: o.Overwrite = False,
    trust_remote_code: o.TrustRemoteCode = False,
    as_json: o.Json = False,
) -> None:
    """Make MODEL smaller by SPARSITY, keeping its quality with text from DATA."""
    output = Output(as_json)
    job = o.make_job(
        model,
        out,
        config,
        assignments,
        sparsity,
        shape,
        data=data,
        eval_data=eval_data,
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        length=length,
        method=method,
        gates=gates,
        shapes=shapes,
        neuron_multiple=neuron_multiple,
        hidden_multiple=hidden_multiple,
        device=device,
        dtype=dtype,
        bits=bits,
        text_column=text_column,
        seed=seed,
        report_to=o.trackers(report_to),
        gradient_checkpointing=gradient_checkpointing or None,
        dry_run=dry_run,
        resume=resume,
        overwrite=overwrite,
        trust_remote_code=trust_remote_code,
    )
    if not {"target_sparsity", "shape"} & set(job.settings):
        raise UserError("no sparsity given: pass --sparsity, such as --sparsity 0.2, or --shape")
    result = run(job, output)
    if result is not None:
        print_results(result.records, output)
        print_report(job, output)
