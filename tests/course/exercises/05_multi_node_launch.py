"""Plausible wrong answers to the exercises of 05_multi_node_launch."""

import os


def wrong_1_a(rank, ranks_a_machine):
    return rank % ranks_a_machine, rank // ranks_a_machine  # the other way round


def wrong_1_b(rank, ranks_a_machine):
    return rank // ranks_a_machine, rank


def wrong_2_a(store):
    return store.add("number", 1)  # from 1 on


def wrong_2_b(store):
    return os.getpid()  # no other process has it, but they do not begin at 0


def wrong_3_a(store, rank, world_size, word):
    store.set("word", word)  # one key for all: the last one wins
    return [store.get("word").decode() for _ in range(world_size)]


def wrong_3_b(store, rank, world_size, word):
    store.set(f"word/{rank}", word)
    return [store.get(f"word/{other}") for other in range(world_size)]  # bytes


def wrong_4_a(slurm, port):
    return {
        "RANK": slurm["SLURM_PROCID"],
        "WORLD_SIZE": slurm["SLURM_NTASKS"],  # of the job, not of the step
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }


def wrong_4_b(slurm, port):
    return {
        "RANK": slurm["SLURM_NODEID"],  # the machine's number
        "WORLD_SIZE": slurm["SLURM_STEP_NUM_TASKS"],
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
