// Paddle operators ernie5_exchange_start and ernie5_exchange_wait: rows to every rank of a gloo group and from it.
//   exchange_start  input rows [S,...], any type, on the CPU, sorted by the rank they go to. attributes send_counts and
//                   receive_counts int64 [N], rows to and from each of the group's N ranks; group: its id.
//                   outputs received [R,...], sorted by source, not to be touched before the wait; ticket int64 [1].
//   exchange_wait   input ticket. output times int64 [5], nanoseconds of the monotonic clock: started, sending from ..
//                   until, receiving from .. until. Throws when a peer is gone or silent for gloo's time-out.
// A rank's own rows are copied at once. Every rank starts the same exchanges of a group in the same order.
#pragma once

#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <string>
#include <vector>

#include "exchange/exchange.h"
#include "paddle/extension.h"
#include "paddle/phi/core/dense_tensor.h"

// Their one instance and their members are Paddle's, so these must not become hidden symbols of this library.
#pragma GCC visibility push(default)
#include "paddle/phi/core/distributed/comm_context_manager.h"

namespace phi {
namespace distributed {

// Paddle's header of this class wants gloo's headers, which the wheel lacks. These are the two members used, as
// paddle/phi/core/distributed/gloo_comm_context.h of 3.3.1 declares them: unlike ProcessGroup's, they take the tag, and
// so keep out of the count by which the group's other collectives find each other.
class GlooCommContext final : public CommContext {
 public:
  void Send(const phi::DenseTensor& in_tensor, int dst, uint32_t tag);
  void Recv(phi::DenseTensor* out_tensor, int src, uint32_t tag);
};

}  // namespace distributed
}  // namespace phi
#pragma GCC visibility pop

namespace ernie5 {
namespace exchange_binding {

using paddle::DataType;
using paddle::Tensor;
using Shape = std::vector<int64_t>;

// The bytes of a piece as a tensor that does not own them.
inline phi::DenseTensor as_tensor(const Piece& piece) {
  auto memory = std::make_shared<phi::Allocation>(piece.data, static_cast<size_t>(piece.bytes), phi::CPUPlace());
  return phi::DenseTensor(memory, phi::DenseTensorMeta(phi::DataType::UINT8, phi::make_ddim({piece.bytes})));
}

struct Group {
  int rank, size;
  std::unique_ptr<Channel> channel;
};

// Never destroyed, see Channel.
inline Group& group_of(int64_t id) {
  static std::mutex mutex;
  static auto* groups = new std::map<int64_t, Group>();
  std::lock_guard<std::mutex> lock(mutex);
  auto found = groups->find(id);
  if (found != groups->end()) return found->second;
  auto& manager = phi::distributed::CommContextManager::GetInstance();
  const std::string key = std::to_string(id);
  PD_CHECK(manager.Has(key), "exchange: group ", id, " is not a gloo group of this process");
  auto* context = static_cast<phi::distributed::GlooCommContext*>(manager.Get(key));
  auto send = [context](const Piece& piece, uint32_t tag) { context->Send(as_tensor(piece), piece.peer, tag); };
  auto receive = [context](const Piece& piece, uint32_t tag) {
    phi::DenseTensor tensor = as_tensor(piece);
    context->Recv(&tensor, piece.peer, tag);
  };
  Group group{context->GetRank(), context->GetSize(), std::make_unique<Channel>(send, receive)};
  return groups->emplace(id, std::move(group)).first->second;
}

// Exchanges not yet waited for, by ticket.
struct Pending {
  std::mutex mutex;
  std::map<int64_t, std::shared_ptr<Exchange>> exchanges;
  int64_t next = 0;

  static Pending& instance() {
    static auto* pending = new Pending();
    return *pending;
  }
};

inline int64_t total(const Shape& counts) { return std::accumulate(counts.begin(), counts.end(), int64_t{0}); }

// What lies for, or from, each rank in `data`: at step s the rank `towards` * s ahead, itself left out.
inline std::vector<Piece> pieces(void* data, const Shape& counts, int64_t row_bytes, const Group& group, int towards) {
  std::vector<int64_t> first(counts.size() + 1, 0);
  std::partial_sum(counts.begin(), counts.end(), first.begin() + 1);
  std::vector<Piece> found;
  for (int step = 1; step < group.size; ++step) {
    const int peer = (group.rank + towards * step + group.size) % group.size;
    found.push_back({static_cast<char*>(data) + first[peer] * row_bytes, counts[peer] * row_bytes, peer});
  }
  return found;
}

inline std::vector<Tensor> start(const Tensor& rows, const Shape& send_counts, const Shape& receive_counts,
                                 int64_t group_id) {
  PD_CHECK(rows.is_cpu(), "exchange takes tensors on the CPU");
  Group& group = group_of(group_id);
  const size_t size = static_cast<size_t>(group.size);
  PD_CHECK(send_counts.size() == size && receive_counts.size() == size, "exchange: a count for each of ", size,
           " ranks");
  PD_CHECK(total(send_counts) == rows.shape()[0], "exchange: ", rows.shape()[0], " rows, counts of ",
           total(send_counts));
  PD_CHECK(send_counts[group.rank] == receive_counts[group.rank], "exchange: a rank's own rows come back to it");
  Shape shape = rows.shape();
  shape[0] = total(receive_counts);
  Tensor received = paddle::empty(shape, rows.dtype(), rows.place());
  const int64_t row_bytes = std::accumulate(shape.begin() + 1, shape.end(), int64_t{1}, std::multiplies<int64_t>()) *
                            static_cast<int64_t>(phi::SizeOf(rows.dtype()));
  char* from = static_cast<char*>(const_cast<void*>(rows.data()));
  char* to = static_cast<char*>(received.data());
  const int64_t own_from = total(Shape(send_counts.begin(), send_counts.begin() + group.rank));
  const int64_t own_to = total(Shape(receive_counts.begin(), receive_counts.begin() + group.rank));
  if (send_counts[group.rank] > 0) {
    std::memcpy(to + own_to * row_bytes, from + own_from * row_bytes, send_counts[group.rank] * row_bytes);
  }
  auto keep = std::make_shared<std::vector<Tensor>>(std::vector<Tensor>{rows, received});
  auto exchange = group.channel->start(pieces(from, send_counts, row_bytes, group, 1),
                                       pieces(to, receive_counts, row_bytes, group, -1), keep);
  Tensor ticket = paddle::empty({1}, DataType::INT64, rows.place());
  Pending& pending = Pending::instance();
  std::lock_guard<std::mutex> lock(pending.mutex);
  ticket.data<int64_t>()[0] = pending.next;
  pending.exchanges.emplace(pending.next++, std::move(exchange));
  return {received, ticket};
}

inline std::vector<Tensor> wait(const Tensor& ticket) {
  std::shared_ptr<Exchange> exchange;
  {
    Pending& pending = Pending::instance();
    std::lock_guard<std::mutex> lock(pending.mutex);
    auto found = pending.exchanges.find(ticket.data<int64_t>()[0]);
    PD_CHECK(found != pending.exchanges.end(), "exchange: waited for twice");
    exchange = std::move(found->second);
    pending.exchanges.erase(found);
  }
  const std::string error = exchange->wait();
  PD_CHECK(error.empty(), "exchange failed ", error);
  const Exchange::Times t = exchange->times();
  Tensor times = paddle::empty({5}, DataType::INT64, ticket.place());
  const int64_t values[5] = {t.started, t.send_began, t.sent, t.receive_began, t.received};
  std::memcpy(times.data<int64_t>(), values, sizeof(values));
  return {times};
}

inline std::vector<Shape> start_shape(const Shape& rows, const Shape& /*send_counts*/, const Shape& receive_counts,
                                      const int64_t& /*group*/) {
  Shape shape = rows;
  shape[0] = total(receive_counts);
  return {shape, {1}};
}
inline std::vector<DataType> start_dtype(const DataType& rows) { return {rows, DataType::INT64}; }
inline std::vector<Shape> wait_shape(const Shape& /*ticket*/) { return {{5}}; }
inline std::vector<DataType> wait_dtype(const DataType& ticket) { return {ticket}; }

}  // namespace exchange_binding
}  // namespace ernie5

PD_BUILD_OP(ernie5_exchange_start)
    .Inputs({"rows"})
    .Outputs({"received", "ticket"})
    .Attrs({"send_counts: std::vector<int64_t>", "receive_counts: std::vector<int64_t>", "group: int64_t"})
    .SetKernelFn(PD_KERNEL(ernie5::exchange_binding::start))
    .SetInferShapeFn(PD_INFER_SHAPE(ernie5::exchange_binding::start_shape))
    .SetInferDtypeFn(PD_INFER_DTYPE(ernie5::exchange_binding::start_dtype));

PD_BUILD_OP(ernie5_exchange_wait)
    .Inputs({"ticket"})
    .Outputs({"times"})
    .SetKernelFn(PD_KERNEL(ernie5::exchange_binding::wait))
    .SetInferShapeFn(PD_INFER_SHAPE(ernie5::exchange_binding::wait_shape))
    .SetInferDtypeFn(PD_INFER_DTYPE(ernie5::exchange_binding::wait_dtype));
