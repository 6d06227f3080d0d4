#!/usr/bin/env bash
# 几台机器，没有调度器：每台上运行同一条命令，torchrun 自己编号。改下面四行，别的不必动。
#
#     第一台： ./torchrun_node.sh ../../qwen_chinese_finetune/sft_chinese_qwen.py --preset full
#     第二台： 同一条命令
#
# 先在一台上试：NODES=1 GPUS_PER_NODE=2 HEAD=localhost ./torchrun_node.sh 脚本 参数
set -euo pipefail

NODES="${NODES:-2}"                 # 一共几台
GPUS_PER_NODE="${GPUS_PER_NODE:-8}" # 一台几块 GPU
HEAD="${HEAD:-10.0.0.1}"            # 第一台的地址：别的机器要 ping 得通
PORT="${PORT:-29500}"               # 碰头的端口：防火墙要放行

if [ "$#" -lt 1 ]; then
    echo "用法：$0 脚本.py [参数 …]" >&2
    exit 2
fi

# NCCL：几块网卡时要说用哪一块（ip addr 里能互相连通的那块），不然它可能挑中 docker0。不设就让它自己找。
if [ -n "${NETWORK:-}" ]; then
    export NCCL_SOCKET_IFNAME="$NETWORK" GLOO_SOCKET_IFNAME="$NETWORK"
fi
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"      # 连不上、卡住时改成 INFO，看它用了哪块网卡
export TORCH_NCCL_ASYNC_ERROR_HANDLING=1     # 一个进程死了，别的报错退出，不一直等
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-8}"

# 断了自动重来最多三次；每次都从最近的检查点接着
exec torchrun \
    --nnodes "$NODES" \
    --nproc-per-node "$GPUS_PER_NODE" \
    --rdzv-backend c10d \
    --rdzv-endpoint "$HEAD:$PORT" \
    --rdzv-id "${JOB:-nlp-learning}" \
    --max-restarts 3 \
    "$@"
