// Events of the simulation: an event names its latest record, which a stream marks when it comes to it.
#include "state.h"

namespace kvbm {
namespace simulated {
namespace {

std::shared_ptr<Event> find_event(cudaEvent_t handle) {
  const auto found = state().events.find(reinterpret_cast<uint64_t>(handle));
  return found == state().events.end() ? nullptr : found->second;
}

}  // namespace
}  // namespace simulated
}  // namespace kvbm

using namespace kvbm::simulated;

cudaError_t cudaStreamWaitEvent(cudaStream_t handle, cudaEvent_t event_handle, unsigned int) {
  Lock lock(state().lock);
  if (const cudaError_t code = enter(lock, "cudaStreamWaitEvent")) return code;
  const std::shared_ptr<Stream> stream = find_stream(handle);
  const std::shared_ptr<Event> event = find_event(event_handle);
  if (stream == nullptr || event == nullptr) return keep(cudaErrorInvalidResourceHandle);
  if (event->record == nullptr) return cudaSuccess;
  Operation operation;
  operation.kind = "wait";
  operation.source = reinterpret_cast<uint64_t>(event_handle);
  operation.record = event->record;
  return queue(lock, stream, std::move(operation));
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned int flags) {
  Lock lock(state().lock);
  if (const cudaError_t code = enter(lock, "cudaEventCreateWithFlags")) return code;
  State& all = state();
  const uint64_t handle = all.next_handle += 0x100;
  all.events[handle] = std::make_shared<Event>(Event{current_device(), (flags & cudaEventDisableTiming) == 0, nullptr});
  *event = reinterpret_cast<cudaEvent_t>(handle);
  return cudaSuccess;
}

cudaError_t cudaEventDestroy(cudaEvent_t event) {
  Lock lock(state().lock);
  if (const cudaError_t code = injected("cudaEventDestroy")) return keep(code);
  if (reinterpret_cast<uint64_t>(event) <= state().forgotten_handle) return cudaSuccess;
  if (state().events.erase(reinterpret_cast<uint64_t>(event)) == 0) return keep(cudaErrorInvalidResourceHandle);
  return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t event_handle, cudaStream_t handle) {
  Lock lock(state().lock);
  if (const cudaError_t code = enter(lock, "cudaEventRecord")) return code;
  const std::shared_ptr<Stream> stream = find_stream(handle);
  const std::shared_ptr<Event> event = find_event(event_handle);
  if (stream == nullptr || event == nullptr || event->device != stream->device) {
    return keep(cudaErrorInvalidResourceHandle);
  }
  event->record = std::make_shared<Record>();
  Operation operation;
  operation.kind = "record";
  operation.source = reinterpret_cast<uint64_t>(event_handle);
  operation.record = event->record;
  return queue(lock, stream, std::move(operation));
}

cudaError_t cudaEventQuery(cudaEvent_t handle) {
  Lock lock(state().lock);
  if (const cudaError_t code = enter(lock, "cudaEventQuery")) return code;
  const std::shared_ptr<Event> event = find_event(handle);
  if (event == nullptr) return keep(cudaErrorInvalidResourceHandle);
  if (event->record == nullptr) return cudaSuccess;
  return event->record->is_done ? keep(event->record->code) : keep(cudaErrorNotReady);
}

cudaError_t cudaEventSynchronize(cudaEvent_t handle) {
  Lock lock(state().lock);
  if (const cudaError_t code = enter(lock, "cudaEventSynchronize")) return code;
  const std::shared_ptr<Event> event = find_event(handle);
  if (event == nullptr) return keep(cudaErrorInvalidResourceHandle);
  const std::shared_ptr<Record> record = event->record;
  if (record == nullptr) return cudaSuccess;
  const cudaError_t code =
      reach(lock, false, [&] { return record->is_done; }, [&] { return stream_with(record.get()); });
  return code != cudaSuccess ? code : keep(record->code);
}

cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t begin_handle, cudaEvent_t end_handle) {
  Lock lock(state().lock);
  if (const cudaError_t code = enter(lock, "cudaEventElapsedTime")) return code;
  const std::shared_ptr<Event> begin = find_event(begin_handle), end = find_event(end_handle);
  if (begin == nullptr || end == nullptr || !begin->has_timing || !end->has_timing || begin->record == nullptr ||
      end->record == nullptr) {
    return keep(cudaErrorInvalidResourceHandle);
  }
  if (!begin->record->is_done || !end->record->is_done) return keep(cudaErrorNotReady);
  *milliseconds = std::chrono::duration<float, std::milli>(end->record->at - begin->record->at).count();
  return cudaSuccess;
}
