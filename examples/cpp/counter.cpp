// Increments the number in a file, as many processes may do at once: counter TARGET FILE ROUNDS lock|nolock
//
// Reading, adding one and writing are three steps. Without the lock, increments get lost.
//
//     c++ -std=c++17 counter.cpp $(pkg-config --cflags --libs etcdlock) -o counter
#include <etcdlock.hpp>

#include <chrono>
#include <fstream>
#include <iomanip>
#include <iostream>
#include <mutex>
#include <string>
#include <thread>

int main(int argc, char **argv) try {
    using namespace std::chrono;
    if (argc != 5) {
        std::cerr << "usage: counter TARGET FILE ROUNDS lock|nolock\n";
        return 64;
    }
    const std::string target = argv[1], file = argv[2], how = argv[4];
    const int rounds = std::stoi(argv[3]);

    etcdlock::session session(target, etcdlock::options().ttl(seconds(10)));
    etcdlock::mutex mutex(session, "/demo/counter");

    for (int round = 0; round < rounds; round++) {
        std::unique_lock lock(mutex, std::defer_lock);
        const auto start = steady_clock::now();
        if (how == "lock")
            lock.lock();
        const auto waited = duration_cast<microseconds>(steady_clock::now() - start);

        unsigned long long value = 0;
        std::ifstream(file) >> value;
        value++;
        std::this_thread::sleep_for(microseconds(200));
        // In place and always ten digits: one step, so that a reader never finds half a number.
        std::fstream(file, std::ios::in | std::ios::out) << std::setw(10) << std::setfill('0') << value;

        const auto token = lock ? std::to_string(mutex.token()) : "-";
        std::cout << "token=" << token << " value=" << value << " waited_us=" << waited.count() << std::endl;
    }
    session.close();
} catch (const std::exception &error) {
    std::cerr << "counter: " << error.what() << '\n';
    return 1;
}
