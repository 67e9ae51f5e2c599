"""Several nodes on one machine: torch's launcher as two agents, Slurm with fake commands, both on CPU with
gloo."""

import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from mmengine.config import Config

from convnext_dense.config.batch_size import scale_batch
from convnext_dense.config.resume import set_resume
from convnext_dense.datasets import toy_shapes
from helpers.paths import ROOT
from helpers.processes import WITHOUT_WORKERS
from helpers.recipes import load

DEMO = ROOT / 'configs/demo/upernet.py'
PAGE = (ROOT / 'docs/multi_node.md').read_text()
OPTIONS = [
    *WITHOUT_WORKERS,
    'train_dataloader.batch_size=2',
    'train_cfg.val_interval=2',
    'default_hooks.checkpoint.interval=2',
    'default_hooks.logger.interval=1',
]
# SyncBN needs GPUs, and batch norm statistics would differ between the processes.
OPTIONS += [
    f'model.{head}.norm_cfg.{s}' for head in ('decode_head', 'auxiliary_head') for s in ('type=GN', 'num_groups=8')
]
ON_CPU = [
    'env_cfg.dist_cfg.backend=gloo',
    'env_cfg.dist_cfg.timeout=120',
    'model_wrapper_cfg.type=MMDistributedDataParallel',
    'model_wrapper_cfg.device_ids=None',
]
# mmengine assigns a GPU to each process, even without GPUs. The ranks that save checkpoints are recorded.
SITECUSTOMIZE = """
import os
import torch
torch.cuda.set_device = lambda device: None
save = torch.save
def counting_save(content, *args, **kwargs):
    if 'state_dict' in content:
        with open(os.environ['SAVES'], 'a') as file:
            file.write(os.environ.get('RANK', '-'))
    return save(content, *args, **kwargs)
torch.save = counting_save
"""
SRUN = """#!/usr/bin/env bash
echo "srun $*" >> "$CALLS"
while [[ $1 == --* ]]; do [[ $1 != --ntasks=* ]] || export SLURM_NTASKS=${1#*=}; shift; done
code=0
for ((i = 0; i < SLURM_NTASKS; i++)); do SLURM_PROCID=$i SLURM_LOCALID=$i "$@" & tasks[i]=$!; done
echo "${tasks[*]}" > "$TASKS"
for task in "${tasks[@]}"; do wait "$task" || code=$?; done
exit $code
"""
SCONTROL = '#!/usr/bin/env bash\necho "scontrol $*" >> "$CALLS"\n[[ $1 != show ]] || { echo localhost; echo other; }\n'
SCANCEL = '#!/usr/bin/env bash\necho "scancel $*" >> "$CALLS"\nkill -TERM $(cat "$TASKS")\n'


@pytest.fixture(scope='module')
def cluster(tmp_path_factory):
    """A folder with data and fake Slurm commands, and the environment of the processes."""
    folder = tmp_path_factory.mktemp('nodes')
    toy_shapes.write(folder / 'shapes', train=8, val=3, size=64)
    (folder / 'site').mkdir()
    (folder / 'site/sitecustomize.py').write_text(SITECUSTOMIZE)
    (folder / 'bin').mkdir()
    for name, text in {'srun': SRUN, 'scontrol': SCONTROL, 'scancel': SCANCEL}.items():
        (folder / 'bin' / name).write_text(text)
        (folder / 'bin' / name).chmod(0o755)
    env = {k: v for k, v in os.environ.items() if not k.startswith('SLURM_')}
    env |= dict(
        SHAPES_ROOT=str(folder / 'shapes'),
        SAVES=str(folder / 'saves'),
        CALLS=str(folder / 'calls'),
        TASKS=str(folder / 'tasks'),
        PATH=f'{folder}/bin:{Path(sys.executable).parent}:{os.environ["PATH"]}',
        PYTHONPATH=f'{folder}/site:{ROOT}',
    )
    return folder, env


def slurm_env(**overrides) -> dict[str, str]:
    """The variables that sbatch sets for a job of one node and two tasks."""
    variables = dict(SLURM_JOB_ID=str(os.getpid()), SLURM_JOB_NUM_NODES='1', SLURM_NTASKS_PER_NODE='2')
    return (
        variables
        | dict(SLURM_CPUS_PER_TASK='1', SLURM_NODELIST='node[1-2]', SLURM_JOB_NODELIST='node[1-2]')
        | overrides
    )


def free_port() -> str:
    with socket.socket() as s:
        s.bind(('localhost', 0))
        return str(s.getsockname()[1])


@pytest.fixture(scope='module')
def trained_dir(cluster):
    """Two agents of torch's launcher, as on two nodes with a process each."""
    folder, env = cluster
    command = [ROOT / 'tools/dist_train.sh', DEMO, '--work-dir', folder / 'run', '--cfg-options', *OPTIONS, *ON_CPU]
    env = env | dict(NNODES='2', GPUS='1', MASTER_PORT=free_port())
    nodes = [
        subprocess.Popen([*command, 'train_cfg.max_iters=2'], env=env, stderr=subprocess.PIPE, text=True, stdout=-3)
        for _ in range(2)
    ]
    errors = [node.communicate(timeout=300)[1] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], '\n'.join(errors)[-5000:]
    return folder / 'run'


def read_log(run: Path) -> tuple[list[dict], str]:
    """Records and text log of the latest session; all processes write one."""
    start = max(path for path in run.iterdir() if path.is_dir())
    (text,), (scalars,) = start.glob('*.log'), start.rglob('scalars.json')
    return [json.loads(line) for line in scalars.read_text().splitlines()], text.read_text()


@pytest.mark.slow
def test_two_nodes_write_once_and_evaluate_jointly(cluster, trained_dir):
    folder, env = cluster
    assert (folder / 'saves').read_text() == '0' and [f.name for f in trained_dir.glob('*.pth')] == ['iter_2.pth']
    assert len([path for path in trained_dir.iterdir() if path.is_dir()]) == 1
    records, text = read_log(trained_dir)
    assert [r['step'] for r in records] == [1, 2, 2] and 'GPU number: 2' in text
    assert 'Iter(val) [2/2]' in text  # three images

    command = [sys.executable, ROOT / 'tools/test.py', DEMO, trained_dir / 'iter_2.pth', '--work-dir', folder / 'alone']
    subprocess.run([*command, '--cfg-options', *OPTIONS], env=env, check=True, capture_output=True, timeout=300)
    (metrics,) = folder.glob('alone/test/*/*.json')
    metrics = json.loads(metrics.read_text())
    assert metrics['aAcc'] > 1
    assert {k: records[-1][k] for k in ('aAcc', 'mIoU', 'mAcc')} == {k: metrics[k] for k in ('aAcc', 'mIoU', 'mAcc')}


@pytest.mark.slow
def test_slurm_script_resumes_last_checkpoint(cluster, trained_dir):
    folder, env = cluster
    saves = (folder / 'saves').read_text()
    command = [ROOT / 'tools/slurm_train.sh', DEMO, '--work-dir', trained_dir, '--cfg-options', *OPTIONS, *ON_CPU]
    process = subprocess.run(
        [*command, 'train_cfg.max_iters=4'],
        env=env | slurm_env(),
        cwd=ROOT,
        text=True,
        capture_output=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr[-5000:]
    assert (folder / 'saves').read_text() == saves + '0' and (trained_dir / 'iter_4.pth').exists()
    records, text = read_log(trained_dir)
    assert [r['step'] for r in records] == [3, 4, 4] and 'GPU number: 2' in text and 'iter_2.pth' in text
    calls = (folder / 'calls').read_text().splitlines()
    assert calls[0].startswith('srun --ntasks=2 --cpus-per-task=1 --kill-on-bad-exit=1 python -u tools/train.py ')
    assert calls[0].endswith('--launcher slurm --resume auto')
    assert calls[1:] == ['scontrol show hostname node[1-2]'] * 2  # by mmengine, in each task


@pytest.fixture
def start_job(cluster, tmp_path):
    """Start the Slurm script with a fake train.py."""
    env = cluster[1]
    (tmp_path / 'python').symlink_to('/bin/bash')  # bash -u takes tools/train.py as its script
    (tmp_path / 'tools').mkdir()

    def start(script: str, **overrides) -> subprocess.Popen:
        (tmp_path / 'tools/train.py').write_text(script)
        paths = dict(PATH=f'{tmp_path}:{env["PATH"]}', CALLS=str(tmp_path / 'calls'), TASKS=str(tmp_path / 'tasks'))
        return subprocess.Popen(
            [ROOT / 'tools/slurm_train.sh', 'c.py'], cwd=tmp_path, env=env | slurm_env(**overrides) | paths
        )

    return start


def test_slurm_time_limit(start_job, tmp_path):
    process = start_job(
        "trap 'sleep 1; touch saved; exit 143' TERM; touch begun; for i in {1..600}; do sleep 0.1; done"
    )
    while not (tmp_path / 'begun').exists():
        time.sleep(0.05)
    time.sleep(0.5)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(timeout=30) == 143 and (tmp_path / 'saved').exists()
    calls = [line for line in (tmp_path / 'calls').read_text().splitlines() if 'srun' not in line]
    assert calls == [f'scancel --signal=TERM {os.getpid()}', f'scontrol requeue {os.getpid()}']


@pytest.mark.parametrize('code', [0, 2, 7])
def test_slurm_exit_code_without_requeue(start_job, tmp_path, code):
    assert start_job(f'exit {code}', SLURM_JOB_NUM_NODES='4', SLURM_NTASKS_PER_NODE='1').wait(timeout=30) == code
    (call,) = (tmp_path / 'calls').read_text().splitlines()
    assert call.startswith('srun --ntasks=4 ')


def test_scripts_report_missing_settings():
    for script in ('dist_train.sh', 'slurm_train.sh'):
        subprocess.run(['bash', '-n', ROOT / 'tools' / script], check=True)
    process = subprocess.run(['bash', ROOT / 'tools/slurm_train.sh', 'c.py'], capture_output=True, text=True, env={})
    assert process.returncode and 'start this by sbatch' in process.stderr.splitlines()[-1]


def test_resume_auto_without_run_starts_from_load_from(tmp_path):
    """As in a job that is submitted with --resume from its first start."""
    config = Config(dict(work_dir=str(tmp_path / 'new'), load_from='fine.pth', resume=False))
    assert set_resume(config, 'auto') is None
    assert config.load_from == 'fine.pth' and not config.resume


def test_docs_table_matches_train_behavior():
    rows = re.findall(r'^\| +(\d+) \| +(\d+) \| +(\d+) \| +(\d+) \| +(\d+) \|$', PAGE, re.MULTILINE)
    assert [int(row[0]) for row in rows] == [1, 2, 4, 8, 16, 32, 64]
    for row in rows:
        gpus, images, accumulation, total, images_per_iter = map(int, row)
        for recipe in ('cascade/convnext_t', 'upernet/convnext_t'):
            config = load(recipe)
            message, level = scale_batch(config, gpus)
            assert config.train_dataloader.batch_size == images
            assert config.optim_wrapper.get('accumulative_counts', 1) == accumulation
            assert total == gpus * images * accumulation and images_per_iter == gpus * images
            assert (level == logging.WARNING) == (total != 16) and f'total batch {total}' in message


def test_docs_page_links_and_names():
    for target in re.findall(r'\]\((?!https?:)([^)#]+)\)', PAGE):
        assert (ROOT / 'docs' / target).exists(), target
    for tool in set(re.findall(r'tools/(\w+\.\w+)', PAGE)):
        assert (ROOT / 'tools' / tool).exists(), tool
