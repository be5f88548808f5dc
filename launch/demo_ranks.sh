# Sourced by demo.sh and demo_long.sh: up to two GPUs, else two CPU processes. Sets kind, ranks, where and port.
# Ends here, with the reason, where there is a GPU that torch can't use.
gpus=$(python -m bagel_ds.demo.devices)
if [ "$gpus" -gt 0 ]; then
    kind=GPU
    ranks=$((gpus < 2 ? gpus : 2))
else
    kind=CPU
    ranks=2
    export DS_ACCELERATOR=cpu
    # The processes share the cores; without this each would start one thread per core.
    cores=$(getconf _NPROCESSORS_ONLN)
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores < 2 * ranks ? 1 : cores / ranks))}
fi
where=(--num_gpus "$ranks")
if [[ $kind = GPU && ${CUDA_VISIBLE_DEVICES:-} =~ ^[0-9]+(,[0-9]+)*$ ]]; then  # --num_gpus would drop it
    where=(--include "localhost:$(cut -d, -f "1-$ranks" <<< "$CUDA_VISIBLE_DEVICES")")
fi
port=${MASTER_PORT:-29500}
# DeepSpeed leaves its shared memory on the CPU behind, 66 MiB per process.
trap 'rm -f /dev/shm/deepspeed_allreduce_buffer_0_*_"$port"_* 2> /dev/null || true' EXIT
export BAGEL_DS_PROGRESS=${BAGEL_DS_PROGRESS:-1}  # a bar also where the output is not a terminal
