"""The emulated NPU itself: its arithmetic is the CPU's, and its rules are a device's."""

import textwrap

import pytest


@pytest.fixture
def emulated(npu_programs):
    """Runs a script in a process, or in some ranks, where ``import torch`` finds the emulated device."""

    def run(script, ranks=1, **environment):
        each = npu_programs.run_ranks([["-c", textwrap.dedent(script)]] * ranks, **environment)
        assert [done.returncode for done in each] == [0] * ranks, [done.stderr for done in each]
        return each[0].stdout

    return run


def test_emulated_training_is_the_cpus(emulated):
    emulated("""
        import torch
        from torch import nn
        from torch.nn import functional

        class Block(nn.Module):
            def __init__(self):
                super().__init__()
                self.embed, self.norm = nn.Embedding(50, 32), nn.LayerNorm(32)
                self.qkv, self.out, self.head = nn.Linear(32, 96), nn.Linear(32, 32), nn.Linear(32, 50)

            def forward(self, ids, picture):
                x = self.embed(ids)
                x = x.masked_scatter((ids == 0).unsqueeze(-1), picture)
                q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
                y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
                return self.head(x + functional.dropout(self.out(y.transpose(1, 2).flatten(2)), 0.0))

        def losses(device):
            torch.manual_seed(0)
            model, ids, picture = Block(), torch.randint(50, (4, 12)), torch.randn(48 * 32)
            model, ids, picture = model.to(device), ids.to(device), picture.to(device)
            optimizer, found = torch.optim.AdamW(model.parameters(), 1e-2, foreach=True), []
            for _ in range(5):
                optimizer.zero_grad()
                loss = functional.cross_entropy(model(ids, picture)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                found.append(loss.item())
            states = [value.device for state in optimizer.state.values() for value in state.values() if value.dim()]
            assert {parameter.grad.device for parameter in model.parameters()} | set(states) == {torch.device(device)}
            return torch.tensor(found)

        expected, actual = losses("cpu"), losses("npu:1")
        assert expected[0] - expected[-1] > 0.5
        torch.testing.assert_close(actual, expected, rtol=0, atol=2e-6)
    """)


def test_emulated_devices_do_not_mix(emulated):
    emulated("""
        import torch
        assert torch.npu.device_count() == 3 and torch.accelerator.current_accelerator().type == "npu"
        first, second = torch.ones(2, device="npu"), torch.ones(2, device="npu:2")
        assert (first.device, second.view(1, 2).device) == (torch.device("npu:0"), torch.device("npu:2"))
        table, rows = torch.ones(3, 3, device="npu"), torch.tensor([1, 2])
        for mistake in (
            lambda: first + torch.ones(2),
            lambda: first + second,
            lambda: torch.nn.functional.embedding(rows, table),
            lambda: torch.ones(1, device="npu:3"),
            lambda: first.numpy(),
        ):
            try:
                mistake()
            except (RuntimeError, TypeError):
                continue
            raise AssertionError("a mistake went through")
        assert table[rows].device == table.device and (first * torch.tensor(2.0)).sum().item() == 4
        assert torch.add(first, second.to("npu:0"), out=torch.empty(0, device="npu")).tolist() == [2, 2]
    """, EMULATED_NPU_COUNT="3")  # fmt: skip


@pytest.mark.parametrize(("visible", "count"), [("0", 1), ("0,1", 2), ("1,7", 1), ("", 0)])
def test_emulated_devices_can_be_hidden(emulated, visible, count):
    script = "import torch; print(torch.npu.device_count(), torch.accelerator.is_available())"
    assert emulated(script, ASCEND_RT_VISIBLE_DEVICES=visible).split() == [str(count), str(count > 0)]


def test_emulated_memory_is_counted(emulated):
    emulated("""
        import torch
        before = torch.npu.memory_allocated(1)
        x = torch.ones(256, 4, device="npu:1")
        y = x * 2
        assert torch.npu.memory_allocated(1) == before + 2 * 4096 and torch.npu.memory_allocated(0) == 0
        del x, y
        assert torch.npu.memory_allocated("npu:1") == before
        assert torch.npu.max_memory_allocated(torch.device("npu:1")) >= before + 2 * 4096
        torch.npu.reset_peak_memory_stats(1)
        assert torch.npu.max_memory_allocated(1) == before
    """)


def test_emulated_random_state_is_the_devices(emulated):
    emulated("""
        import torch
        torch.manual_seed(1)
        cpu_state, state = torch.get_rng_state(), torch.npu.get_rng_state("npu:1")
        first = torch.nn.functional.dropout(torch.ones(100, device="npu:1"))
        assert 20 < (first == 0).sum() < 80 and torch.equal(torch.get_rng_state(), cpu_state)
        torch.npu.set_rng_state(state, torch.device("npu:1"))
        assert torch.equal(torch.nn.functional.dropout(torch.ones(100, device="npu:1")), first)
        generator = torch.Generator("npu").manual_seed(2)
        assert torch.rand(3, generator=generator, device="npu").device == torch.device("npu:0")
    """)


def test_emulated_device_loads_and_saves(emulated, tmp_path):
    emulated("""
        import os, torch
        loader = torch.utils.data.DataLoader(torch.arange(8.0), batch_size=4, num_workers=2, pin_memory=True)
        batches = [(batch.is_pinned(), batch.to("npu", non_blocking=True).sum().item()) for batch in loader]
        assert batches == [(True, 6), (True, 22)]
        saved = {"x": torch.ones(3, device="npu:1")}
        torch.save(saved, os.environ["FILE"])
        assert torch.load(os.environ["FILE"])["x"].device == torch.device("npu:1")
        assert torch.load(os.environ["FILE"], map_location="cpu")["x"].is_cpu
        with torch.autocast("npu", dtype=torch.bfloat16):
            x = torch.nn.Linear(3, 2, device="npu:1")(saved["x"])
            assert x.dtype == torch.bfloat16 and x.softmax(0).dtype == torch.float32
    """, FILE=str(tmp_path / "saved.pth"))  # fmt: skip


START = """
        import os, torch
        from torch import distributed as dist
        dist.init_process_group(os.environ.get("BACKEND", "cpu:gloo,npu:hccl"))
        rank = dist.get_rank()
        device = torch.device("npu", rank)
        torch.npu.set_device(device)
"""


@pytest.mark.parametrize("as_view", [False, True])
def test_emulated_ddp_averages_gradients(emulated, as_view):
    script = """
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.GELU(), torch.nn.Linear(7, 3)).to(device)
        data = torch.randn(2, 4, 5).to(device)
        expected = [torch.zeros_like(parameter) for parameter in model.parameters()]
        for part in data:
            for sum_, gradient in zip(expected, torch.autograd.grad(model(part).square().mean(), model.parameters())):
                sum_ += gradient / 2
        as_view = os.environ["AS_VIEW"] == "True"
        ddp = torch.nn.parallel.DistributedDataParallel(model, device_ids=[rank], gradient_as_bucket_view=as_view)
        for _ in range(2):
            ddp.zero_grad()
            ddp(data[rank]).square().mean().backward()
            for parameter, gradient in zip(model.parameters(), expected):
                assert parameter.grad.device == device
                torch.testing.assert_close(parameter.grad, gradient, rtol=0, atol=1e-7)
        dist.destroy_process_group()
    """
    emulated(START + script, ranks=2, AS_VIEW=str(as_view))


def test_emulated_fsdp2_trains(emulated):
    script = """
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard
        torch.manual_seed(0)
        model, data = torch.nn.Linear(8, 4, device=device), torch.randn(2, 4, 8).to(device)
        dist.broadcast(model.weight.data, 0)
        dist.broadcast(model.bias.data, 0)
        dist.broadcast(data, 0)
        expected = torch.autograd.grad(model(data).square().mean(), model.parameters())
        fully_shard(model, mesh=init_device_mesh("npu", (2,)))
        model.set_force_sum_reduction_for_comms(True)  # the default averages, which HCCL does not
        model(data[rank]).square().mean().backward()
        for parameter, gradient in zip(model.parameters(), expected):
            assert parameter.to_local().device == device
            torch.testing.assert_close(parameter.grad.full_tensor(), gradient, rtol=0, atol=1e-7)
        dist.destroy_process_group()
    """
    emulated(START + script, ranks=2)


@pytest.mark.parametrize("backend", ["cpu:gloo,npu:hccl", "hccl"])
def test_emulated_collectives(emulated, backend):
    script = """
        def mine():
            return torch.arange(2.0, device=device) + 10 * rank
        x = mine()
        dist.all_reduce(x)
        assert x.tolist() == [10, 12]
        try:
            dist.all_reduce(x, op=dist.ReduceOp.AVG)
        except RuntimeError as error:
            assert "AVG" in str(error)
        else:
            raise AssertionError("AVG went through")
        parts = [torch.empty(2, device=device) for _ in range(2)]
        dist.all_gather(parts, mine())
        assert torch.cat(parts).tolist() == [0, 1, 10, 11]
        whole = torch.empty(4, device=device)
        dist.all_gather_into_tensor(whole, mine())
        assert torch.equal(whole, torch.cat(parts))
        dist.reduce_scatter_tensor(x, whole)
        assert x.tolist() == [[0, 2], [20, 22]][rank]
        dist.broadcast(x, 0)
        assert x.tolist() == [0, 2]
        work = dist.all_reduce(x, async_op=True)
        work.wait()
        assert x.tolist() == [0, 4] and work.result()[0].device == device
        dist.send(mine(), 1) if rank == 0 else dist.recv(x, 0)
        dist.barrier()
        objects = [None] * 2
        dist.all_gather_object(objects, {"rank": rank})
        assert objects == [{"rank": 0}, {"rank": 1}]
        objects = [rank]
        dist.broadcast_object_list(objects, 1)
        assert objects == [1]
        dist.destroy_process_group()
    """
    emulated(START + script, ranks=2, BACKEND=backend)
